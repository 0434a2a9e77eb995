"""From docstrings and table cells to Markdown that shows every character."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_ITEM = re.compile(r"^\s*(?:[*-]|\d+\.)\s")
_CODE = re.compile(r"(`[^`]*`)")
_SECTION = re.compile(r"^(Args|Raises|Returns|Yields|Cost|Source):\s*$")


def prose(docstring: str) -> str:
    """A docstring as Markdown: lists get the blank line and the indent that they need, `<` is no tag."""
    lines: list[str] = []
    previous = ""
    in_section = False
    for line in _outside_code(docstring).splitlines():
        section = _SECTION.match(line)
        if section:
            line, in_section = f"**{section.group(1)}**", True
        elif in_section and line.startswith("    "):
            line = _argument(line)
        elif line.strip():
            in_section = False
        if _ITEM.match(line) and previous.strip() and not _ITEM.match(previous) and not previous.startswith(" "):
            lines.append("")
        lines.append(_nested(line))
        previous = line
    return "\n".join(lines)


def cell(text: str) -> str:
    """Text for a cell of a table."""
    return _outside_code(" ".join(str(text).split())).replace("|", "\\|") or "–"


def code_cell(text: str) -> str:
    """Code for a cell of a table."""
    return "`" + text.replace("|", "\\|") + "`"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [
        f"| {' | '.join(head)} |",
        "|" + "---|" * len(head),
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def _outside_code(text: str) -> str:
    """`<` and `*` between spaces are characters; ``double backticks`` are code as well."""
    parts = _CODE.split(text.replace("``", "`"))
    return "".join(
        part if part.startswith("`") else part.replace("<", "&lt;").replace(" * ", " \\* ") for part in parts
    )


def _argument(line: str) -> str:
    """`    name: what it is` as an item of a list; deeper lines go on with it."""
    if line.startswith("     "):
        return line
    name, found, rest = line.strip().partition(": ")
    return f"* `{name}`: {rest}" if found else f"* {line.strip()}"


def _nested(line: str) -> str:
    """Markdown wants four spaces below an item where docstrings have two or three."""
    spaces = len(line) - len(line.lstrip())
    return f"    {line.lstrip()}" if 0 < spaces < 4 else line
