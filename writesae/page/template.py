"""Templates of pages: every value escaped, Markdown without HTML, numbers as a reader sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jinja2
from markdown_it import MarkdownIt
from markupsafe import Markup

from writesae.page.format import interval, number, percent


def markdown(text: str) -> Markup:
    """Markdown as HTML. HTML in the text is shown as text, so no docstring or label can insert markup, and no picture
    is shown, so that a page loads nothing."""
    return Markup(MarkdownIt("commonmark", {"html": False}).disable("image").render(text))


def environment(*packages: str, **filters: Callable[..., object]) -> jinja2.Environment:
    """Templates of this package and of others, with every value escaped, and further filters."""
    loaders = [jinja2.PackageLoader(package, "page") for package in ("writesae", *packages)]
    made = jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"cell": cell_text, "share": share_text, "markdown": markdown} | filters
    return made


def cell_text(value: object) -> str:
    """A table's value for a person."""
    if isinstance(value, float):
        return number(value)
    if value is None:
        return "–"
    return f"{value:,}" if type(value) is int else str(value)  # a truth value is an int, too


def share_text(value: float | Mapping[str, float | None] | None) -> str:
    """A share in percent, with its interval where it has one; a dash where there is none."""
    if not isinstance(value, Mapping):
        return "–" if value is None else percent(value)
    low = value["low"]
    high = value["high"]
    share = percent(value["mean"] or 0)
    return share if low is None or high is None else share + interval(low, high, percent)
