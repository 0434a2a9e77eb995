"""Files that are whole or absent: written aside, then renamed; and folders that one process works in at a time."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout
from safetensors import SafetensorError

if TYPE_CHECKING:
    import pandas as pd


def atomic_write(target: Path, write: Callable[[Path], object]) -> Path:
    """Call `write` with a file beside `target`, then rename that file; after an exception nothing is left.

    Makes the folder of `target` where there is none.

    Raises:
        OSError: it cannot be written; names `target`, which errors of some libraries do not.
    """
    with named_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        os.close(handle)
        aside = Path(name)
        try:
            write(aside)
            aside.chmod(0o644)
            os.replace(aside, target)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
    return target


@contextmanager
def named_errors(target: Path) -> Iterator[None]:
    """In this scope, where files are written, a full disk or a read-only folder leads to an OSError that names
    `target`, whichever library met it."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, f"cannot be written ({error.strerror or error})", str(target)) from error
    except (SafetensorError, RuntimeError) as error:  # what safetensors' and torch's writers raise
        raise OSError(errno.EIO, f"cannot be written ({error})", str(target)) from error


def atomic_text(target: Path, text: str) -> Path:
    """Write a text file in UTF-8, whole or not at all."""
    return atomic_write(target, lambda file: file.write_text(text, encoding="utf-8"))


def atomic_csv(target: Path, table: pd.DataFrame) -> Path:
    """Write a table as CSV, whole or not at all. A spreadsheet would run a cell that begins with = + - or @, and a cell
    may hold a token of any text; so such a cell gets an apostrophe in front."""

    def plain(cell: object) -> object:
        return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell

    return atomic_text(target, table.map(plain).to_csv(index=False))


def check_settings(folder: Path, settings: Mapping[str, object]) -> None:
    """Raise ValueError where the `config.json` of a folder has other settings; names them."""
    file = folder / "config.json"
    own = json.loads(json.dumps(settings))
    there = json.loads(file.read_text(encoding="utf-8")) if file.exists() else own
    differing = [f"{key}: {there.get(key)!r}, now {own[key]!r}" for key in own if there.get(key) != own[key]]
    if differing:
        raise ValueError(
            f"{folder} holds a run with other settings ({'; '.join(differing)}); give another --out, or the same "
            "settings to go on with it"
        )


def keep_settings(folder: Path, settings: Mapping[str, object]) -> None:
    """Write `config.json`, or raise what `check_settings` raises. Nothing is overwritten."""
    check_settings(folder, settings)
    if not (folder / "config.json").exists():
        atomic_text(folder / "config.json", json.dumps(settings, indent=1))


def check_writable(folder: Path) -> None:
    """Raise ValueError unless `folder` can be made or written to. Commands call this before any work."""
    there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    try:  # because permission alone does not tell: some of a system's folders refuse later
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        reason = "is a file" if there.is_file() else f"takes no files ({error.strerror})"
        raise ValueError(f"{folder} cannot be written: {there} {reason}; name another --out") from error


@contextmanager
def taken(folder: Path, say: Callable[[str], object] = print) -> Iterator[None]:
    """Have a folder, which is made, to oneself among the processes that ask; waits for the one that has it.

    The operating system lets go of the lock when a process dies, so that a killed one blocks nobody.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".taken")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"another process works in {folder}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def free_bytes(folder: Path) -> int:
    """Room on the disk on which a folder is or would be made."""
    resolved = folder.resolve()
    return shutil.disk_usage(next(path for path in (resolved, *resolved.parents) if path.exists())).free


def size_text(n: float) -> str:
    """A number of bytes for a person."""
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB"
