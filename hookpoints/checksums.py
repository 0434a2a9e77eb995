"""Checksums of a folder, so that a file that changed since it was written is told from one that did not.

A flipped bit in a weight is a valid number; nothing else can find it. The file ``SHA256SUMS`` has the format of the
program ``sha256sum``: in any model folder ``sha256sum *.json *.safetensors > SHA256SUMS`` makes one, and loading checks
it where there is one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from hookpoints.errors import ChecksumError

CHECKSUMS = "SHA256SUMS"
"""Name of the file."""
_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^/\\\0]+)")


def write_checksums(folder: Path, names: Iterable[str]) -> Path:
    """Write the checksums of files of ``folder``. Costs one reading of each."""
    lines = [f"{_digest(folder / name)}  {name}\n" for name in names]
    file = folder / CHECKSUMS
    file.write_text("".join(lines), encoding="utf-8")
    return file


def check_checksums(folder: Path) -> None:
    """Compare every file that ``SHA256SUMS`` lists; do nothing where there is none. Costs one reading of each file.

    Raises:
        ChecksumError: a listed file is missing or was changed, or the list itself is damaged; names the file.
    """
    file = folder / CHECKSUMS
    if not file.is_file():
        return
    for number, line in enumerate(file.read_bytes().decode("utf-8", "replace").splitlines(), 1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise ChecksumError(f"line {number} of {file} is no checksum and name of a file in its folder: {line!r}")
        digest, name = match.groups()
        if not (folder / name).is_file():
            raise ChecksumError(f"{file} lists {name}, which is not there")
        if _digest(folder / name) != digest:
            raise ChecksumError(
                f"{folder / name} is not the file that {CHECKSUMS} beside it was made from: it was damaged, edited, or "
                f"belongs to another save. Fetch or save it again; if you changed it on purpose, delete {CHECKSUMS}"
            )


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
