"""Sizes of files and disks, for people."""

from __future__ import annotations

import shutil
from pathlib import Path

SAVE_SECONDS = 60.0
"""Time between two writes of what is not finished: what a kill may lose, and one batch."""


def free_bytes(folder: Path) -> int:
    """Room on the disk on which a folder is."""
    return shutil.disk_usage(folder).free


def size_text(n: float) -> str:
    """A number of bytes for a person."""
    if n >= 1e9:
        return f"{n / 1e9:.1f} GB"
    return f"{n / 1e6:.0f} MB" if n >= 1e6 else f"{n / 1e3:.0f} KB"
