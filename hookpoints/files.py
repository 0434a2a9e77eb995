"""Files that are whole or absent, and folders that someone else may have written: what these hold is data, and may be
damaged or malicious.

What is written is written aside, in a folder `.NAME.<32 hexadecimal digits>.aside` of the same folder, reaches the
disk, and is renamed. What a killed process left aside is removed by a later one; a folder that it was about to replace
is replaced (`finish`). What another program wrote is not replaced, unless it has the name that was asked for and is a
regular file. Nothing is written through a folder that is a link.

The file ``SHA256SUMS`` seals a folder: a flipped bit in a weight is a valid number, and nothing else can find it. The
program ``sha256sum`` has the same format. In any model folder ``sha256sum *.json *.safetensors > SHA256SUMS`` makes the
file, and loading compares every file that it reads.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from uuid import uuid4

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from hookpoints.errors import ChecksumError, DamageWarning, InputError

CHECKSUMS = "SHA256SUMS"
"""Name of the file."""
_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^/\\\0]+)")
_ASIDE = re.compile(r"\..+\.[0-9a-f]{32}\.aside")
_LOCK = ".lock"
_EARLIER = "earlier"
"""What a folder that is replaced is called aside."""
_YOUNG = 60.0
"""Seconds for which a folder aside is left alone, whether it is locked or not: its owner locks it after making it."""


# ------------------------------------------------------------------------------------------------ writing


def atomic_write(target: Path, write: Callable[[Path], object]) -> Path:
    """Call ``write`` with a path aside, then rename what is there to ``target``; after an exception nothing is left.

    The file and its folder have reached the disk when this returns. Makes the folder of ``target`` where there is none.
    Threads and processes may write the same target: the last one stays.

    Raises:
        OSError: it cannot be written, or ``target`` is a link, a folder or a device, which is not replaced; names
            ``target``, which errors of some libraries do not.
    """
    with named_errors(target), aside_of(target) as aside:
        check_replaceable(target)
        written = aside / target.name
        write(written)
        _sync_to_disk(written)
        os.replace(written, target)
        _sync_to_disk(target.parent)
    return target


def atomic_text(target: Path, text: str) -> Path:
    """Write a text file in UTF-8, whole or not at all."""
    return atomic_write(target, lambda file: file.write_text(text, encoding="utf-8"))


def atomic_folder(target: Path, write: Callable[[Path], object], names: Callable[[Path], Iterable[str]]) -> Path:
    """As `atomic_write`, for a folder: ``write`` is called with an empty one, which replaces ``target``.

    Args:
        names: of the files in an earlier folder, which is given, that were written by this too. A folder that holds
            anything else is not replaced (`check_folder`).
    """
    with named_errors(target), aside_of(target) as aside:
        check_folder(target, names)
        written = aside / target.name
        written.mkdir()
        write(written)
        for path in (*written.rglob("*"), written):
            _sync_to_disk(path)
        if target.exists():
            target.rename(aside / _EARLIER)  # after a kill here `finish` has both
        written.rename(target)
        _sync_to_disk(target.parent)
    return target


def atomic_files(folder: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with an empty folder aside, rename the files that it then has into ``folder``, and seal them.
    Other files of ``folder`` stay as they are.

    Raises:
        OSError: as of `atomic_write`, or the folder's ``SHA256SUMS`` seals other files.
    """
    seal = folder / CHECKSUMS
    with named_errors(folder), aside_of(seal) as aside:
        written = aside / "files"
        written.mkdir()
        write(written)
        names = sorted(file.name for file in written.iterdir())
        write_checksums(written, names)
        for name in (*names, CHECKSUMS):
            check_replaceable(folder / name)
        if foreign := {*sealed_names(folder)} - {*names}:
            names_sealed = ", ".join(sorted(foreign))
            raise FileExistsError(errno.EEXIST, f"seals other files ({names_sealed}); name another folder", str(seal))
        for name in (*names, CHECKSUMS):
            _sync_to_disk(written / name)
            os.replace(written / name, folder / name)
        _sync_to_disk(folder)


def check_replaceable(target: Path) -> None:
    """Raise FileExistsError, which names it, where ``target`` is there and is not a regular file."""
    if os.path.lexists(target) and (target.is_symlink() or not target.is_file()):
        kind = "a link" if target.is_symlink() else "a folder" if target.is_dir() else "a device"
        raise FileExistsError(
            errno.EEXIST, f"expected no file or a regular one, got {kind}, which is not replaced", str(target)
        )


def check_folder(target: Path, names: Callable[[Path], Iterable[str]]) -> None:
    """Raise FileExistsError, which names what is there, unless ``target`` does not exist, or is a folder of regular
    files among ``names(target)``."""
    if not os.path.lexists(target):
        return
    foreign = [target]
    if target.is_dir() and not target.is_symlink():
        known = {*names(target)}
        foreign = [path for path in target.iterdir() if path.name not in known or path.is_symlink() or path.is_dir()]
    if foreign:
        raise FileExistsError(
            errno.EEXIST,
            f"expected no folder, or one that this replaces, got {sorted(foreign)[0]}, which was not written by it; "
            "name another folder",
            str(target),
        )


@contextmanager
def named_errors(target: Path) -> Iterator[None]:
    """In this scope, where files are written, a full disk or a read-only folder leads to an OSError that names
    ``target``, whichever library met it."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileExistsError) or error.filename == str(target):
            raise
        raise OSError(error.errno, f"cannot be written ({error.strerror or error})", str(target)) from error
    except (SafetensorError, RuntimeError) as error:  # what safetensors' and torch's writers raise
        raise OSError(errno.EIO, f"cannot be written ({error})", str(target)) from error


def set_aside(path: Path, why: str) -> None:
    """Rename a damaged file or folder to ``NAME.damaged`` (``NAME.damaged-1`` where there is one), and warn of it."""
    numbers = ("", *(f"-{n}" for n in range(1, 1000)))
    names = (path.with_name(f"{path.name}.damaged{number}") for number in numbers)
    renamed = path.rename(next(name for name in names if not os.path.lexists(name)))
    warnings.warn(
        f"{path} is damaged ({why}): it is {renamed.name} now, and what it held is made again",
        DamageWarning,
        stacklevel=2,
    )


@contextmanager
def aside_of(target: Path) -> Iterator[Path]:
    """A folder in that of ``target`` for what is not whole yet. It is locked, so that nobody takes it for one that a
    killed process left, and removed in any case.

    Raises:
        FileExistsError: the folder of ``target`` is a link.
    """
    if target.parent.is_symlink():
        raise FileExistsError(
            errno.EEXIST,
            f"expected a folder, got a link, and nothing is written through links; name {target.parent.resolve()}",
            str(target.parent),
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    _clean_asides(target.parent)
    folder = target.with_name(f".{target.name}.{uuid4().hex}.aside")
    folder.mkdir()
    try:
        with FileLock(folder / _LOCK):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@cache
def _clean_asides(parent: Path) -> None:
    """Finish or remove what killed processes left aside in a folder; once in a process."""
    finish(parent)
    for folder in _folders_aside(parent):
        with suppress(OSError, Timeout):
            if time.time() - folder.stat().st_mtime > _YOUNG:
                with FileLock(folder / _LOCK, timeout=0):
                    shutil.rmtree(folder)


def finish(parent: Path) -> None:
    """Rename the folders that `atomic_folder` was about to rename in ``parent`` when it was killed: the earlier one was
    aside already, and the new one is whole. What a living process has aside is locked, and left."""
    for folder in _folders_aside(parent):
        name = folder.name[1:].rsplit(".", 2)[0]
        if (folder / _EARLIER).exists() and not os.path.lexists(parent / name):
            with suppress(OSError, Timeout), FileLock(folder / _LOCK, timeout=0):
                (folder / name).rename(parent / name)


def _folders_aside(parent: Path) -> list[Path]:
    """The folders aside in ``parent``; none where it is no folder."""
    inside = parent.iterdir() if parent.is_dir() else ()
    folders = [path for path in inside if path.is_dir() and not path.is_symlink()]
    return [path for path in folders if _ASIDE.fullmatch(path.name)]


def _sync_to_disk(path: Path) -> None:
    """Return when a file or folder has reached the disk. Some file systems cannot do this for folders."""
    opened = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError) if path.is_dir() else nullcontext():
            os.fsync(opened)
    finally:
        os.close(opened)


# ------------------------------------------------------------------------------------------------ checking


def check_tensors(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    kinds: Mapping[str, tuple[torch.dtype, list[int]]],
    finite: bool = False,
) -> None:
    """Raise InputError unless the tensors of a file have these names, dtypes and shapes, and numbers that are
    ``finite``."""
    got = {name: (x.dtype, list(x.shape)) for name, x in tensors.items()}
    for name in sorted({*kinds, *got}):
        if kinds.get(name) != got.get(name):
            raise InputError(f"{path}: {name}: expected {kinds.get(name)}, got {got.get(name)}")
        if finite and not tensors[name].isfinite().all():
            raise InputError(f"{path}: {name}: expected finite numbers, got NaN or infinity")


def content_hash(value: object) -> str:
    """SHA-256 of nested mappings and sequences of tensors, numbers and words; equal for equal values. Costs a pass."""
    digest = hashlib.sha256()

    def add(part: object) -> None:
        if isinstance(part, torch.Tensor):
            digest.update(f"{part.dtype} {list(part.shape)}\n".encode())
            digest.update(_tensor_bytes(part))
        elif isinstance(part, Mapping):
            digest.update(f"{len(part)} names\n".encode())
            for name in sorted(part, key=repr):
                add(name)
                add(part[name])
        elif isinstance(part, Sequence) and not isinstance(part, str):
            digest.update(f"{len(part)} entries\n".encode())
            for entry in part:
                add(entry)
        else:
            digest.update(f"{part!r}\n".encode())

    add(value)
    return digest.hexdigest()


def tensors_hash(tensors: Mapping[str, torch.Tensor], settings: Mapping[str, object] | None = None) -> str:
    """SHA-256 of ``settings`` and of names, dtypes, shapes and bytes of ``tensors``. Costs a pass."""
    digest = hashlib.sha256()
    if settings is not None:
        digest.update(json.dumps(settings, sort_keys=True).encode())
    # Under their names and in their dtypes: equal bytes of other tensors are other weights.
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        digest.update(_tensor_bytes(x))
    return digest.hexdigest()


def _tensor_bytes(x: torch.Tensor) -> memoryview:
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def plain_file(folder: Path, name: str, error: type[ValueError] = ChecksumError) -> Path:
    """The path of a regular file of ``folder``; ``error``, which names it, for a link, for what is outside, and for
    what is missing or no file. Nothing is read.

    A link may lead to a file that its author could not read, and the reader publishes it. The links of the Hugging Face
    cache are an exception: they lead from a snapshot to the blobs of the same cache.
    """
    inside = Path(os.path.realpath(folder))
    file = Path(os.path.realpath(inside / name))
    is_inside = file == inside / name and file.is_relative_to(inside)
    if not is_inside:
        snapshots = [parent for parent in inside.parents if parent.name == "snapshots"]
        caches = [cache for parent in snapshots for cache in (parent.parent, parent.parents[1])]
        is_inside = any(file.is_relative_to(cache / "blobs") for cache in caches)
    if not is_inside or not file.is_file():
        got = "a link, a folder or a path outside" if os.path.lexists(folder / name) else "none: it does not exist"
        raise error(f"{folder / name}: expected a regular file inside {folder}, got {got}")
    return folder / name


def file_hash(file: Path) -> str:
    """SHA-256 in hexadecimal digits. Costs one reading."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_checksums(folder: Path, names: Iterable[str]) -> Path:
    """Seal files of ``folder``. Costs one reading of each."""
    return atomic_text(folder / CHECKSUMS, "".join(f"{file_hash(folder / name)}  {name}\n" for name in names))


def sealed_names(folder: Path) -> list[str]:
    """The names that the ``SHA256SUMS`` of a folder lists; none where there is no such file. Nothing is compared."""
    seal = folder / CHECKSUMS
    lines = seal.read_text(encoding="utf-8", errors="replace").splitlines() if seal.is_file() else []
    return [match[2] for match in map(_LINE.fullmatch, lines) if match]


class SealedFolder:
    """A folder whose files are plain, and, where it is sealed, those that were written.

    Args:
        error: what is raised; each message names the file.

    Raises:
        ChecksumError, or ``error``: ``SHA256SUMS`` is damaged, or lists a file that is missing. Where there is no
            ``SHA256SUMS``, the folder is not sealed; where it is empty, no file can be read.
    """

    def __init__(self, folder: Path, error: type[ValueError] = ChecksumError) -> None:
        self.folder = folder
        self.error = error
        if not folder.exists():
            finish(folder.parent)
        self.sums = self._listed_sums() if os.path.lexists(folder / CHECKSUMS) else None
        self._whole: set[str] = set()

    def _listed_sums(self) -> dict[str, str]:
        file = plain_file(self.folder, CHECKSUMS, self.error)
        sums: dict[str, str] = {}
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            match = _LINE.fullmatch(line)
            if match is None or not os.path.lexists(self.folder / match[2]):
                raise self.error(
                    f"{file}: expected lines of a SHA-256 and the name of a file of the same folder, got "
                    f"{line!r}: the list is damaged, or that file is missing. Fetch or save the folder again"
                )
            sums[match[2]] = match[1]
        return sums

    def require(self) -> None:
        """Raise unless the folder is sealed, as every folder is that these packages write."""
        if self.sums is None:
            raise self.error(
                f"{self.folder / CHECKSUMS} does not exist, and it was written with the folder: fetch it again. If you "
                f"trust the files as they are, seal them: sha256sum NAMES > {CHECKSUMS}"
            )

    def file(self, name: str) -> Path:
        """The path of a file that is to be read. Costs one reading when it is first asked for, if the folder is sealed.

        Raises:
            ChecksumError, or ``error``: it is not plain, not listed, or was changed.
        """
        file = plain_file(self.folder, name, self.error)
        if self.sums is not None and name not in self._whole:
            expected = self.sums.get(name, "no such name")
            got = file_hash(file)
            if got != expected:
                raise self.error(
                    f"{file}: expected the SHA-256 that seals it ({expected}), got {got}: it was damaged, edited, or "
                    f"belongs to another save. Fetch or save it again; if you changed it on purpose, seal the folder "
                    f"again: sha256sum NAMES > {CHECKSUMS}"
                )
            self._whole.add(name)
        return file

    def check(self, names: Iterable[str] = ()) -> None:
        """Check all that is sealed, and those ``names`` besides, as `file` does."""
        for name in sorted({*(self.sums or ()), *names}):
            self.file(name)


def read_json(file: Path) -> dict[str, object]:
    """The object of names and values that a JSON file holds.

    Raises:
        ValueError: it is cut short, or holds something else; names the file.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is cut short, or is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {type(content).__name__}, not an object of names and values")
    return content


def sealed_json(content: Mapping[str, object]) -> str:
    """JSON of ``content`` with one more entry: the SHA-256 of all others, whatever their layout. `read_sealed_json`
    compares it."""
    plain = json.loads(json.dumps(content, allow_nan=False))
    return json.dumps({"sha256": _values_hash(plain)} | plain, ensure_ascii=False)


def read_sealed_json(file: Path) -> dict[str, object]:
    """What `sealed_json` was given, from a file.

    Raises:
        ValueError: what `read_json` raises, or a value is not the one that was written; names the file.
        OSError: it cannot be read.
    """
    content = read_json(file)
    expected = content.pop("sha256", None)
    if expected != (got := _values_hash(content)):
        raise ValueError(
            f"{file}: expected values of the SHA-256 that the file has ({expected}), got {got}: it was damaged or "
            "edited; make or fetch it again"
        )
    return content


def _values_hash(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of the packages that numbers depend on, of those that are installed."""
    installed = {}
    for package in ("sae-lens-writesae", "hookpoints", "torch", "transformers"):
        with suppress(PackageNotFoundError):
            installed[package] = version(package)
    return installed
