"""Panels of the report as inline SVG that follows the page's colors, light or dark.

A panel is drawn in the colors of a light page, which are then replaced by CSS variables that have them as their
defaults; its text stays text. One panel is about as wide as a phone, so that a page can lay panels out in a grid.
Every panel is made by `intervals`.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from writesae.dictionary.estimates import Estimate
from writesae.page.format import number

_VARIABLES = {
    "#1b1f24": "ink",
    "#5c6670": "muted",
    "#dde1e6": "grid",
    "#1d5fd1": "atom",
    "#c2410c": "rival",
    "#ffffff": "paper",
    "#98a2ad": "soft",
}
"""The colors of a light page, and the CSS variables that have them on a page."""
INK, MUTED, GRID, ATOM, CONTROL, PAPER, SOFT = _VARIABLES
COLORS = {"atom": ATOM, "control": CONTROL, "soft": SOFT}
"""Colors by what they say: the atom; a control that confounds it; the rest."""

_STYLE: dict[str, object] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": INK,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "ytick.major.size": 0,
    "xtick.major.size": 0,
    "lines.solid_capstyle": "round",
}
_DASHED = (0, (3, 3))
_LEAST_HEIGHT = 2.7
"""Of a panel, in inches: those of few rows are as high as each other."""
_HOVER = "hover:"
"""Marks the ids that are texts to show: each becomes a title in the SVG, which a browser shows over it."""


class Row(NamedTuple):
    """One line of `intervals`."""

    name: str
    estimate: Estimate
    colour: str = "soft"
    """Key of `COLORS`."""


# ---------------------------------------------------------------------------------------------- panels


def intervals(
    rows: Sequence[Row],
    label: str,
    title: str,
    *,
    chance: float = 0.0,
    write: Callable[[float], str] = number,
    least: float | None = None,
) -> str:
    """An estimate and its interval in each row, in numbers as `write` writes them; a dashed line at `chance`. What is
    below `least` is drawn there, as a triangle."""
    figure, axes = _panel_axes(0.75 + 0.26 * len(rows))
    # A line from end to end of the interval, and a mark at the mean.
    for y, row in enumerate(rows):
        colour = COLORS[row.colour]
        mean, low, high = (end if least is None else max(end, least) for end in row.estimate[:3])
        lines = axes.plot([low, high], [y, y], color=colour, lw=2.0, alpha=0.55)
        mark = "o" if mean == row.estimate.mean else "<"
        lines += axes.plot(mean, y, mark, color=colour, ms=5, mec=PAPER, mew=0.7)
        words = "{}: {} [{}, {}]".format(row.name, *map(write, row.estimate[:3]))
        for line in lines:
            line.set_gid(_HOVER + words)
    # Axes: rows by name from the top, numbers as a reader sees them.
    axes.axvline(chance, color=MUTED, lw=0.8, ls=_DASHED)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.set_ylim(len(rows) - 0.45, -0.55)  # the first row at the top
    axes.locator_params(axis="x", nbins=4)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))
    axes.set_xlabel(label, loc="right")
    return _svg_text(figure, title)


# ---------------------------------------------------------------------------------------------- drawing


def _panel_axes(height: float) -> tuple[Figure, Axes]:
    """A figure of a phone's width, in inches of 100 units. Names of rows are in ink, numbers are not."""
    with matplotlib.rc_context(_STYLE):  # pyright: ignore[reportArgumentType]  # matplotlib types keys as literals
        figure = Figure(figsize=(3.9, max(height, _LEAST_HEIGHT)), layout="constrained")
        axes = figure.add_subplot()
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    return figure, axes


def _svg_text(figure: Figure, title: str) -> str:
    """The figure as an SVG element: CSS variables for colors, no fixed size, and a title for screen readers.

    Ids inside are made from the title, which must therefore be unique in a page.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": title}):  # pyright: ignore[reportArgumentType]
        # Drawn once; `savefig` draws a figure of this layout twice.
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]  # inline: an XML declaration is no part of HTML
    text = re.sub("|".join(_VARIABLES), lambda colour: f"var(--{_VARIABLES[colour[0]]},{colour[0]})", text)
    # As wide as its column; the viewBox keeps the proportions.
    text = re.sub(r' width="[^"]*" height="[^"]*"', ' role="img" width="100%"', text, count=1)
    text = re.sub(rf"<g id=([\"']){_HOVER}(.*?)\1>", r"<g><title>\2</title>", text)
    # The page's own font, at matplotlib's size.
    text = re.sub(r"font: ([^;\"]*?)px [^;\"]*", r"font-size: \1px", text)
    return re.sub(r"(<svg[^>]*>)", lambda tag: f"{tag[1]}<title>{html.escape(title)}</title>", text, count=1)
