"""Figures of the interventions: inline SVG in the colours of the page, by the helpers of `sae_lens_writesae.plots`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from sae_lens_writesae.plots import ATOM, GRID, INK, MUTED, PAPER, RIVAL, SOFT, _label_ends, _panel, _svg, number

COLOURS = {"atom": ATOM, "rival": RIVAL, "ink": INK, "soft": SOFT, "muted": MUTED}


class Row(NamedTuple):
    """One line of an interval figure."""

    name: str
    mean: float
    low: float
    high: float
    colour: str = "soft"
    """Key of COLOURS."""


class Line(NamedTuple):
    """One line of a curve figure, with a band where there is one."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = "soft"
    band: tuple[Sequence[float], Sequence[float]] | None = None


def interval_figure(rows: Sequence[Row], label: str, title: str, *, zero: float = 0.0, percent: bool = False) -> str:
    """A mean and its interval in each row; a dashed line at `zero`, what chance or nothing gives."""
    figure, axes = _panel(0.75 + 0.26 * len(rows))
    for y, row in enumerate(rows):
        colour = COLOURS[row.colour]
        axes.plot([row.low, row.high], [y, y], color=colour, lw=2.0, alpha=0.55)
        axes.plot(row.mean, y, "o", color=colour, ms=5, mec=PAPER, mew=0.7)
    axes.axvline(zero, color=MUTED, lw=0.8, ls=(0, (3, 3)))
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.set_ylim(len(rows) - 0.45, -0.55)
    if percent:
        axes.set_xlim(-0.02, 1.02)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
    else:
        axes.locator_params(axis="x", nbins=5)
    axes.grid(axis="x", color=GRID, lw=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(label, loc="right")
    return _svg(figure, title)


def scatter_figure(x: ArrayLike, y: ArrayLike, labels: tuple[str, str], title: str, *, size: float = 12) -> str:
    """Points over the diagonal: what was expected (across) against what was found (up)."""
    across, up = np.asarray(x, float), np.asarray(y, float)
    figure, axes = _panel(2.6)
    ends = [float(min(across.min(), 0)), float(max(across.max(), 0))]
    axes.plot(ends, ends, color=MUTED, lw=0.8, ls=(0, (3, 3)))
    axes.axhline(0, color=GRID, lw=0.8)
    axes.scatter(across, up, s=size, color=ATOM, alpha=0.5, lw=0)
    axes.locator_params(nbins=5)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1], color=MUTED)
    axes.tick_params(axis="y", labelcolor=MUTED)
    return _svg(figure, title)


def curve_figure(lines: Sequence[Line], label: str, title: str, *, log_x: bool = False, percent: bool = False) -> str:
    """Lines named at their right end."""
    figure, axes = _panel(2.5)
    low, high = np.inf, -np.inf
    for line in lines:
        colour, strong = COLOURS[line.colour], line.colour in ("atom", "rival", "ink")
        if line.band is not None:
            axes.fill_between(line.x, *line.band, color=colour, alpha=0.16, lw=0)
        axes.plot(line.x, line.y, "-o", color=colour, lw=1.9 if strong else 0.9, ms=3.5 if strong else 2.5)
        low, high = min(low, *line.y), max(high, *line.y)
    points = sorted({x for line in lines for x in line.x})
    if log_x:
        axes.set_xscale("log", base=2)
    axes.set_xticks(points, [number(x) for x in points])
    axes.minorticks_off()
    span = 1.0 if percent else (high - low) or 1.0
    first, last = points[0], points[-1]
    at = last * (last / first) ** 0.04 if log_x else last + 0.04 * (last - first)
    _label_ends(axes, [(line.y[-1], line.name, COLOURS[line.colour]) for line in lines], x=at, gap=0.075 * span)
    axes.set_xlim(right=last * (last / first) ** 0.6 if log_x else last + 0.6 * (last - first))
    if percent:
        axes.set_ylim(-0.03, 1.03)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "50 %", "", "100 %"])
    axes.grid(axis="y", color=GRID, lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", labelcolor=MUTED)
    axes.set_xlabel(label, loc="left")
    return _svg(figure, title)
