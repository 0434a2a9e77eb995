"""Files that are whole or absent: written aside, then renamed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError

SAVE_SECONDS = 60.0
"""Time between two writes of what is not finished: what a kill may lose, and one batch."""


def atomic_write(target: Path, write: Callable[[Path], object]) -> Path:
    """Call `write` with a file in the folder of `target`, then rename that file; after an exception nothing is left.

    Makes the folder of `target` where there is none.

    Raises:
        OSError: it cannot be written; names `target`, which errors of some libraries do not.
    """
    with named_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.{uuid4().hex}")
        try:
            write(aside)
            os.replace(aside, target)
        finally:
            aside.unlink(missing_ok=True)
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


def free_bytes(folder: Path) -> int:
    """Room on the disk on which a folder is."""
    return shutil.disk_usage(folder).free


def size_text(n: float) -> str:
    """A number of bytes for a person."""
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB"
