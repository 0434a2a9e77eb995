"""Sizes of files, for people; and work that several processes share by locks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

T = TypeVar("T")

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
