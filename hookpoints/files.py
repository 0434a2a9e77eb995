"""Folders that someone else may have written: what they hold is data, and may be damaged or malicious.

The file ``SHA256SUMS`` seals a folder: a flipped bit in a weight is a valid number, and nothing else can find it. The
program ``sha256sum`` has the same format. In any model folder ``sha256sum *.json *.safetensors > SHA256SUMS`` makes the
file, and loading compares every file that it reads.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from hookpoints.errors import ChecksumError, require

CHECKSUMS = "SHA256SUMS"
"""Name of the file."""
_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^/\\\0]+)")


def plain_file(folder: Path, name: str, error: type[ValueError] = ChecksumError) -> Path:
    """The path of a regular file of ``folder``; ``error``, which names it, for a link, for what is outside, and for
    what is missing or no file. Nothing is read.

    A link may lead to a file that its author could not read, and the reader publishes it. The links of the Hugging Face
    cache are an exception: they lead from a snapshot to the blobs of the same cache.
    """
    inside = Path(os.path.realpath(folder))
    file = Path(os.path.realpath(inside / name))
    cached = [place for each in inside.parents if each.name == "snapshots" for place in (each.parent, each.parents[1])]
    own = file == inside / name and file.is_relative_to(inside)
    if not file.is_file() or not (own or any(file.is_relative_to(place / "blobs") for place in cached)):
        found = "a link, a folder or a path outside" if os.path.lexists(folder / name) else "none: it does not exist"
        raise error(f"{folder / name}: expected a regular file inside {folder}, got {found}")
    return folder / name


def file_hash(file: Path) -> str:
    """SHA-256 in hexadecimal digits. Costs one reading."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_checksums(folder: Path, names: Iterable[str]) -> Path:
    """Seal files of ``folder``. Costs one reading of each."""
    file = folder / CHECKSUMS
    file.write_text("".join(f"{file_hash(folder / name)}  {name}\n" for name in names), encoding="utf-8")
    return file


class SealedFolder:
    """A folder whose files are plain, and, where it is sealed, those that were written.

    Args:
        error: what is raised; each message names the file.
        sums: SHA-256 by name, where another file than ``SHA256SUMS`` seals the folder.

    Raises:
        ChecksumError, or ``error``: ``SHA256SUMS`` is damaged, or lists a file that is missing. Where there is no
            ``SHA256SUMS``, the folder is not sealed; where it is empty, no file can be read.
    """

    def __init__(
        self, folder: Path, error: type[ValueError] = ChecksumError, sums: Mapping[str, str] | None = None
    ) -> None:
        self.folder, self.error = folder, error
        self.sums = self._read() if sums is None and os.path.lexists(folder / CHECKSUMS) else sums
        self._whole: set[str] = set()

    def _read(self) -> dict[str, str]:
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
        require(
            self.sums is not None,
            self.error,
            f"{self.folder / CHECKSUMS} does not exist, and it was written with the folder: fetch it again. If you "
            f"trust the files as they are, seal them: sha256sum NAMES > {CHECKSUMS}",
        )

    def file(self, name: str) -> Path:
        """The path of a file that is to be read. Costs one reading when it is first asked for, if the folder is sealed.

        Raises:
            ChecksumError, or ``error``: it is not plain, not listed, or was changed.
        """
        file = plain_file(self.folder, name, self.error)
        if self.sums is not None and name not in self._whole:
            expected, found = self.sums.get(name, "no such name"), file_hash(file)
            require(
                found == expected,
                self.error,
                f"{file}: expected the SHA-256 that seals it ({expected}), got {found}: it was damaged, edited, or "
                f"belongs to another save. Fetch or save it again; if you changed it on purpose, seal the folder "
                f"again: sha256sum NAMES > {CHECKSUMS}",
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
