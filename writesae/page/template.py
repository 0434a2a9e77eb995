"""Templates of pages: every value escaped, Markdown without HTML, numbers and outcomes as a reader sees them."""

from __future__ import annotations

from collections.abc import Mapping

import jinja2
from markdown_it import MarkdownIt
from markupsafe import Markup

from writesae.verdict.format import number, percent
from writesae.verdict.paper import Outcome


def markdown(text: str) -> Markup:
    """Markdown as HTML. HTML inside of the text is shown as text, so that nothing in a docstring or a label can put
    markup into a page."""
    return Markup(MarkdownIt("commonmark", {"html": False}).render(text))


def environment() -> jinja2.Environment:
    """Templates of this package, with every value escaped."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("writesae", "page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"cell": cell_text, "share": share_text, "outcome": outcome_text, "markdown": markdown}
    return made


def outcome_text(outcome: Outcome) -> str:
    """An outcome as a reader sees it."""
    return "confounded by a control" if outcome == "confounded" else outcome


def cell_text(value: object) -> str:
    """A table's value for a person."""
    if isinstance(value, float):
        return number(value)
    counts = isinstance(value, int) and not isinstance(value, bool)
    return "–" if value is None else f"{value:,}" if counts else str(value)


def share_text(value: float | Mapping[str, float | None] | None) -> str:
    """A share in percent, with its interval where it has one; a dash where there is none."""
    if not isinstance(value, Mapping):
        return "–" if value is None else percent(value)
    mean, low, high = (value[name] for name in ("mean", "low", "high"))
    return percent(mean or 0) + ("" if low is None or high is None else f" [{100 * low:.1f}, {100 * high:.1f}]")
