"""The hand-written part of a generated page: Markdown with Python blocks that are run where the site is built.

A text lies in ``texts/<kind>/<name>.md``. What it says cannot be had from the code: formulas, when something happens,
how to mend it. What the code says (docstrings, fields, columns, messages) is never repeated there.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent / "texts"
BLOCK = re.compile(r"^```python\n(.*?)^```\n?", flags=re.MULTILINE | re.DOTALL)


class MissingTextError(Exception):
    """A hook, an evaluation or an error has no text, or a text belongs to nothing."""


class Ran(NamedTuple):
    """What came of running the Python blocks of one text."""

    markdown: str
    """The text with what each block printed below it."""
    raised: BaseException | None
    """What the last block raised; blocks before it must not raise."""


def read(kind: str, name: str, wanted: str) -> str:
    """The text of one page. MissingTextError says where to put it, and `wanted` what it must hold."""
    file = FOLDER / kind / f"{name}.md"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if not text.strip():
        where = f"scripts/docs_site/texts/{kind}/{name}.md"
        raise MissingTextError(f"{name} has no page in the documentation: write {where} with {wanted}")
    return text


def check_no_strays(kind: str, names: list[str]) -> None:
    """Raise for texts of things that are no more."""
    strays = sorted({file.stem for file in (FOLDER / kind).glob("*.md")} - set(names))
    if strays:
        raise MissingTextError(f"texts/{kind} has {', '.join(strays)}, which the code does not know: rename or remove")


def python_blocks(markdown: str) -> list[str]:
    """The Python blocks of a page."""
    return BLOCK.findall(markdown)


def run(markdown: str, where: str) -> Ran:
    """Run the Python blocks of a text in one namespace and put what they print below them.

    Raises RuntimeError naming the page where a block before the last one raises.
    """
    blocks = list(BLOCK.finditer(markdown))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    parts, at, raised = [], 0, None
    for block in blocks:
        printed, raised = _run_block(block.group(1), namespace, where)
        if raised is not None and block is not blocks[-1]:
            raise RuntimeError(f"an example of {where} raised {type(raised).__name__}: {raised}") from raised
        parts += [markdown[at : block.end()], _output(printed)]
        at = block.end()
    return Ran("".join([*parts, markdown[at:]]), raised)


def _run_block(code: str, namespace: dict[str, Any], where: str) -> tuple[str, BaseException | None]:
    out = io.StringIO()
    raised: BaseException | None = None
    with warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            exec(compile(code, f"<example of {where}>", "exec"), namespace)
        except Exception as error:
            raised = error
    return out.getvalue(), raised


def _output(printed: str) -> str:
    return f"\n```text\n{printed.rstrip()}\n```\n" if printed.strip() else ""
