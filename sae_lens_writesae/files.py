"""Sizes of files, for people; work that several processes share by locks; and folders that are elsewhere."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import fsspec
from filelock import FileLock, Timeout
from huggingface_hub.constants import HF_HOME

from hookpoints.files import CHECKSUMS, SealedFolder, atomic_write

T = TypeVar("T")

COPIES = Path(HF_HOME) / "sae_lens_writesae"
"""Where files of other machines are copied to."""
COPY_DAYS = 30
"""Days after its last use for which a copied folder stays."""

SAVE_SECONDS = 60.0
"""Time between two writes of what is not finished: what a kill may lose, and one batch."""


def size_text(n: float) -> str:
    """A number of bytes for a person."""
    if n >= 1e9:
        return f"{n / 1e9:.1f} GB"
    return f"{n / 1e6:.0f} MB" if n >= 1e6 else f"{n / 1e3:.0f} KB"


def in_turn(locks: Mapping[T, Path], part: tuple[int, int], say: Callable[[str], object]) -> Iterator[T]:
    """Pieces of work by their lock files, each while this process has its lock: first those that no other process has,
    then the others, once their holders let go.

    The operating system lets go of the locks of a process that dies. So whoever has gone through all, and does what is
    not done yet, knows that all is done.

    Args:
        part: (rank, world) of this process among several, which begins with every world-th piece.
        say: is told of waiting.
    """
    rank, world = part
    waiting = dict.fromkeys([*[*locks][rank::world], *locks])
    for timeout in (0, -1):  # seconds; -1: as long as it takes
        if timeout and waiting:
            say("another process works on what is left; waiting for it")
        for piece in [*waiting]:
            with suppress(Timeout), FileLock(locks[piece], timeout=timeout):
                del waiting[piece]
                yield piece


def _remove_old_copies() -> None:
    """Of folders that nobody opened for a month."""
    for seal in COPIES.glob(f"*/{CHECKSUMS}"):
        with suppress(OSError):  # another process removes it, or may not be asked
            if time.time() - seal.stat().st_mtime > COPY_DAYS * 86_400:
                shutil.rmtree(seal.parent)


def is_address(folder: str | Path) -> bool:
    """Whether it is one that fsspec reads, such as `s3://bucket/collection`, and not a folder of this machine."""
    return "://" in str(folder)


class CopiedFolder(SealedFolder):
    """A sealed folder at an address of fsspec. A file is copied to this machine when it is first asked for, by one
    process while the others wait, and compared as those of a `SealedFolder`. Copies lie in a folder that the checksums
    name, so that those of another save are never taken for it.

    Raises:
        ``error``: the address cannot be read; and what `SealedFolder` raises.
    """

    def __init__(self, address: str, error: type[ValueError]) -> None:
        self.address = address.rstrip("/")
        self.error = error
        with self._reached_for(CHECKSUMS):
            self._system, self._root = fsspec.url_to_fs(self.address)
            seal = self._system.cat_file(f"{self._root}/{CHECKSUMS}")
        folder = COPIES / hashlib.sha256(seal).hexdigest()
        atomic_write(folder / CHECKSUMS, lambda file: file.write_bytes(seal))  # whose date is that of the last use
        _remove_old_copies()
        lines = seal.decode(errors="replace").splitlines()
        super().__init__(folder, error, {line[66:]: line[:64] for line in lines})

    def file(self, name: str) -> Path:
        """The path of its copy; else as of a `SealedFolder`. Costs a copy when a process of this machine first asks."""
        copy = self.folder / name
        with FileLock(self.folder / f".{name}.lock"):
            if not copy.exists():
                atomic_write(copy, lambda file: self._copy_to(file, name))
            try:
                return super().file(name)
            except self.error:
                copy.unlink()  # the next call copies it again
                raise

    def _copy_to(self, file: Path, name: str) -> None:
        with self._reached_for(name):
            self._system.get_file(f"{self._root}/{name}", str(file))

    @contextmanager
    def _reached_for(self, name: str) -> Iterator[None]:
        """Errors of this scope as one line. Each file system has its own classes of them."""
        try:
            yield
        except Exception as error:
            got = " ".join(f"{type(error).__name__}: {error}".split())
            raise self.error(
                f"{self.address}: expected an address from which {name} can be copied to {COPIES}, got {got}; check "
                "the address, its credentials, the network and the room on the disk"
            ) from error
