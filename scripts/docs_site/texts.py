"""The hand-written part of a generated page: Markdown whose Python blocks are run while the site is built.

A text lies in `texts/<kind>/<name>.md`. It holds what the code does not say: formulas, when something happens, how to
mend it. It repeats nothing that the code says (docstrings, fields, columns, messages).
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent / "texts"
PAGES = Path(__file__).parent / "pages"
BLOCK = re.compile(r"^```python\n(.*?)^```\n?", flags=re.MULTILINE | re.DOTALL)


class MissingTextError(Exception):
    """A hook, an evaluation or an error has no text, or a text belongs to nothing."""


class Ran(NamedTuple):
    """A text after its Python blocks ran."""

    markdown: str
    """The text, with the output of each block below it."""
    raised: BaseException | None
    """What the last block raised; blocks before it must not raise."""


def read(kind: str, name: str, headings: Sequence[str]) -> str:
    """The text of one page. MissingTextError names the file to write, and the headings that it must have."""
    file = FOLDER / kind / f"{name}.md"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    missing = [heading for heading in headings if f"## {heading}\n" not in text]
    if missing or not text.strip():
        wanted = ", ".join(f"'## {heading}'" for heading in missing)
        raise MissingTextError(f"{name} needs scripts/docs_site/texts/{kind}/{name}.md with the headings {wanted}")
    return text


def page(name: str, **parts: object) -> str:
    """A page of `pages/` with its parts filled in."""
    return (PAGES / f"{name}.md").read_text(encoding="utf-8").format(**parts)


def check_no_strays(kind: str, names: Iterable[str]) -> None:
    """Raise MissingTextError for texts of things that the code no longer has."""
    if strays := sorted({file.stem for file in (FOLDER / kind).glob("*.md")} - set(names)):
        raise MissingTextError(f"texts/{kind} has {', '.join(strays)}, which the code does not know: rename or remove")


def python_blocks(markdown: str) -> list[str]:
    """The Python blocks of a page."""
    return BLOCK.findall(markdown)


def run(markdown: str, where: str, *, may_raise: bool = False) -> Ran:
    """Run the Python blocks of a text in one namespace, and put what they print below them.

    Raises:
        RuntimeError: a block raised; with `may_raise`, a block before the last one. Names the page.
    """
    blocks = list(BLOCK.finditer(markdown))
    namespace: dict[str, object] = {"__name__": "__main__"}
    parts: list[str] = []
    at, raised = 0, None
    for block in blocks:
        printed = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            try:
                exec(compile(block.group(1), f"<example of {where}>", "exec"), namespace)
            except Exception as error:
                raised = error
        if raised is not None and not (may_raise and block is blocks[-1]):
            raise RuntimeError(f"an example of {where} raised {type(raised).__name__}: {raised}") from raised
        output = printed.getvalue().rstrip()
        parts += [markdown[at : block.end()], f"\n```text\n{output}\n```\n" if output else ""]
        at = block.end()
    return Ran("".join([*parts, markdown[at:]]).rstrip(), raised)


def escape(text: str) -> str:
    """Markdown in which `<` outside code is a character and opens no tag."""
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in re.split(r"(`[^`]*`)", text))


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; what is in a cell is escaped, and an empty cell shows a dash."""
    cells = [[escape(" ".join(str(cell).split())).replace("|", "\\|") or "–" for cell in row] for row in rows]
    first, *rest = (f"| {' | '.join(line)} |\n" for line in (head, *cells))
    return "".join([first, "|" + "---|" * len(head) + "\n", *rest])
