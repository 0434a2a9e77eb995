"""Folders of commands: their settings, one process at a time. Loads no torch, for the sake of help."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from filelock import FileLock, Timeout

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"


GENERATOR = {"generator": "writesae"}
"""Entry of every file of numbers that belongs to a page."""
_MARKS = ('<meta name="generator" content="writesae">', '"generator": "writesae"', '"sae_set": "writesae-')
"""What pages, their numbers, and batches of atoms for other tools begin with."""


def check_settings(folder: Path, settings: Mapping[str, object], names: Sequence[str] = ()) -> None:
    """Raise ValueError where the `config.json` of a folder has other settings; names them.

    Args:
        names: of what is written to the folder after `config.json`. Where that is missing and one of these is there,
            somebody else wrote it, and ValueError names it.
    """
    file = folder / "config.json"
    if not file.exists():
        check_absent(folder / name for name in names)
        return
    expected = json.loads(json.dumps(settings))  # lists for tuples, as the file has them
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{file}: expected the settings of a run, got no JSON ({error}); name another --out"
        ) from error
    saved = content if isinstance(content, dict) else {}
    differing = [
        f"{key}: {saved.get(key)!r}, now {value!r}" for key, value in expected.items() if saved.get(key) != value
    ]
    if differing:
        raise ValueError(
            f"{folder} holds a run with other settings ({'; '.join(differing)}); give another --out, or the same "
            "settings to resume it"
        )


def keep_settings(folder: Path, settings: Mapping[str, object], names: Sequence[str] = ()) -> None:
    """Write `config.json`, or raise what `check_settings` raises. Nothing is overwritten."""
    from hookpoints.files import atomic_text

    check_settings(folder, settings, names)
    if not (folder / "config.json").exists():
        atomic_text(folder / "config.json", json.dumps(settings, indent=1))


def check_absent(files: Iterable[Path]) -> None:
    """Raise ValueError, which names it, where one of the files is there."""
    for file in files:
        if os.path.lexists(file):
            raise ValueError(
                f"{file}: expected nothing, or what this command wrote, got something else; name another --out"
            )


def check_ours(*files: Path) -> None:
    """Raise ValueError, which names it, where one of the files is there and is not what a command of this package wrote
    (`_MARKS`). Commands call this before any work."""
    for file in files:
        if file.is_file() and not file.is_symlink():
            content = file.read_bytes()
            ends = content[:4096] + content[-65_536:]  # a parquet file has what is said of it at its end
            if any(mark.encode() in ends for mark in _MARKS):
                continue
        check_absent([file])


def check_writable(folder: Path) -> None:
    """Raise ValueError where `folder` is a link, or cannot be made or written to. Commands call it before any work."""
    if folder.is_symlink():
        raise ValueError(
            f"{folder}: expected a folder, got a link, and nothing is written through links; name {folder.resolve()}"
        )
    existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    try:  # because permission alone does not tell: some of a system's folders refuse later
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        reason = "is a file" if existing.is_file() else f"takes no files ({error.strerror})"
        raise ValueError(f"{folder} cannot be written: {existing} {reason}; name another --out") from error


def lock_in(folder: Path) -> Path:
    """The file that processes lock to have a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / ".taken"


@contextmanager
def taken(folder: Path, say: Callable[[str], object] = print) -> Iterator[None]:
    """Have a folder, which is made, to oneself among the processes that ask; waits for the one that has it.

    The operating system lets go of the lock when a process dies, so that a killed one blocks nobody.
    """
    lock = FileLock(lock_in(folder))
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        say(f"another process works in {folder}; waiting for it")
        held = lock.acquire()
    with held:
        yield


def sae_folders(path: Path) -> list[Path]:
    """The folders of SAEs that `path` is or holds: those of `writesae train` and `demo` are deeper.

    Raises:
        ValueError: there is none.
    """
    files = [path / "cfg.json"] if (path / "cfg.json").is_file() else sorted(path.rglob("cfg.json"))
    folders = []
    for file in files:
        # Dictionaries that are still being written are in hidden folders, and checkpoints are of unfinished ones.
        parts = file.relative_to(path).parts
        if not any(part.startswith(".") or part in ("checkpoint", "checkpoints") for part in parts):
            folders.append(file.parent)
    if not folders:
        raise ValueError(f"{path / 'cfg.json'} does not exist, and no dictionary is inside it; give another folder")
    return folders


def folder_labels(folders: Sequence[Path]) -> list[str]:
    """Names for the SAEs in folders; one called `sae` is named after the folder that it is in. Where two of these have
    one name, as those of two heads may, the folder above is in all names."""
    named = [folder.parent if folder.name == "sae" else folder for folder in map(Path.resolve, folders)]
    names = [folder.name for folder in named]
    if len(set(names)) == len(names):
        return names
    return [f"{folder.parent.name}/{folder.name}" for folder in named]
