"""Sealed folders: sealing one again after an edit on purpose, and damaging one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from hookpoints.files import CHECKSUMS, write_checksums


def reseal(folder: Path) -> None:
    """As one who edited a file on purpose."""
    write_checksums(folder, sorted(file.name for file in folder.iterdir() if file.is_file() and file.name != CHECKSUMS))


def damaged(data: bytes, draw: random.Random) -> bytes:
    """A copy with one bit flipped, or with its end cut off."""
    at = draw.randrange(len(data))
    if draw.random() < 0.2:
        return data[:at]
    flipped = bytearray(data)
    flipped[at] ^= 1 << draw.randrange(8)
    return bytes(flipped)


def damages(folder: Path, names: list[str], n: int, seed: int = 0) -> Iterator[str]:
    """Damage a folder n times, each time anew: a bit of a file is flipped, its end is cut off, two files change places,
    or an entry of the seal is dropped or gets another name. Yields what was done."""
    draw = random.Random(seed)
    whole = {name: (folder / name).read_bytes() for name in names}
    for number in range(n):
        file = draw.choice(names)
        changed, what = {file: damaged(whole[file], draw)}, "changed"
        if number % 4 == 1 and len(names) > 2:
            other = draw.choice([name for name in names if whole[name] != whole[file]])
            changed, what = {file: whole[other], other: whole[file]}, f"swapped with {other}"
        if number % 4 == 3:
            file, what = CHECKSUMS, "an entry of the seal"
            changed = {file: _unsealed(whole[file].decode(), draw)}
        for name, data in changed.items():
            (folder / name).write_bytes(data)
        yield f"{number}: {file}, {what}"
        for name in changed:
            (folder / name).write_bytes(whole[name])


def _unsealed(seal: str, draw: random.Random) -> bytes:
    entries = [line.split("  ") for line in seal.splitlines()]
    at, other = draw.sample(range(len(entries)), 2)
    digest, name = entries[at]
    renamed = [digest, draw.choice([entries[other][1], "x", f"../elsewhere/{name}"])]
    entries[at : at + 1] = draw.choice([[], [renamed]])
    return "".join(f"{'  '.join(entry)}\n" for entry in entries).encode()
