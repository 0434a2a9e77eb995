"""Markdown tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby


def escape(text: str) -> str:
    """Markdown in which `<` outside code is a character and opens no tag."""
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in re.split(r"(`[^`]*`)", text))


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; what is in a cell is escaped, and an empty cell shows a dash."""
    cells = [[escape(" ".join(str(cell).split())).replace("|", "\\|") or "–" for cell in row] for row in rows]
    first, *rest = (f"| {' | '.join(line)} |\n" for line in (head, *cells))
    return "".join([first, "|" + "---|" * len(head) + "\n", *rest])


def spans(numbers: Iterable[int]) -> str:
    """1, 2, 3, 5 as "1–3, 5"."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
