"""Markdown tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def escape(text: str) -> str:
    """Markdown in which `<` outside code is a character and opens no tag."""
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in re.split(r"(`[^`]*`)", text))


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; what is in a cell is escaped, and an empty cell shows a dash."""
    cells = [[escape(" ".join(str(cell).split())).replace("|", "\\|") or "–" for cell in row] for row in rows]
    first, *rest = (f"| {' | '.join(line)} |\n" for line in (head, *cells))
    return "".join([first, "|" + "---|" * len(head) + "\n", *rest])
