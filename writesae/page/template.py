"""Templates of pages: every value escaped, Markdown without HTML, numbers as a reader sees them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import jinja2
from markdown_it import MarkdownIt
from markupsafe import Markup

from writesae.verdict.format import number, percent


def markdown(text: str) -> Markup:
    """Markdown as HTML. HTML in the text is shown as text, so no docstring or label can insert markup."""
    return Markup(MarkdownIt("commonmark", {"html": False}).render(text))


def environment(**filters: Callable[..., object]) -> jinja2.Environment:
    """Templates of this package, with every value escaped, and further filters."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("writesae", "page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"cell": cell_text, "share": share_text, "controls": control_rows, "markdown": markdown} | filters
    return made


def cell_text(value: object) -> str:
    """A table's value for a person."""
    if isinstance(value, float):
        return number(value)
    return "–" if value is None else f"{value:,}" if type(value) is int else str(value)


def share_text(value: float | Mapping[str, float | None] | None) -> str:
    """A share in percent, with its interval where it has one; a dash where there is none."""
    if not isinstance(value, Mapping):
        return "–" if value is None else percent(value)
    mean, low, high = (value[name] for name in ("mean", "low", "high"))
    return percent(mean or 0) + ("" if low is None or high is None else f" [{100 * low:.1f}, {100 * high:.1f}]")


def control_rows(text: str) -> list[tuple[str, str]]:
    """Name and numbers of each control of `Claim.controls`; the name is empty where no number follows one."""
    named = r"(.+?):? ((?:[-−+<>≤≥]|below |above )*\d.*|–)"
    parts = [(each, re.fullmatch(named, each)) for each in text.split("; ") if each]
    return [(found[1], found[2]) if found else ("", each) for each, found in parts]
