"""Figures of the report as inline SVG that follows the page's colours, light or dark.

Figures are drawn with placeholder colours that are then replaced by CSS variables, and their text stays text.
One panel is about as wide as a phone, so a page can lay panels out in a grid.
"""

import html
import io
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sae_lens_writesae.conditions import CONTROLS, NAMES
from sae_lens_writesae.summary import Summary

_VARIABLES = {
    "#010203": "ink",
    "#010204": "muted",
    "#010205": "grid",
    "#010206": "atom",
    "#010207": "rival",
    "#010208": "paper",
    "#010209": "soft",
}
INK, MUTED, GRID, ATOM, RIVAL, PAPER, SOFT = _VARIABLES

SCALE_NAMES = {"coefficient": "coefficient", "matched": "matched norm", "least_squares": "least squares"}
_MARKERS = {"coefficient": "o", "matched": "s", "least_squares": "D"}

_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
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


class HeadPoint(NamedTuple):
    """One head in the figure of win rates by memory."""

    label: str
    target: str  # write or state
    half_life: float
    capped: bool  # the half-life is at least that long
    rate: float
    low: float
    high: float
    control: float | None  # the best control's rate against deletion


def win_rate_figure(summary: Summary, rivals: Sequence[str] = (), name: str = "") -> str:
    """Share of firings on which each condition is nearer to the native model than deletion, at every scale.

    Rows: the atom, then the controls; `rivals` are drawn in the colour of an explanation. Bars are cluster
    intervals.
    """
    table: Any = summary.comparisons
    table = table[table["b"] == "delete"]
    names = [n for n in ("atom", *CONTROLS) if (table["a"] == n).any()]
    scales = list(dict.fromkeys(table["scale"]))
    figure, axes = _panel(2.05 + 0.14 * len(names))
    for row, condition in enumerate(names):
        for i, scale in enumerate(scales):
            one = table[(table["a"] == condition) & (table["scale"] == scale)].iloc[0]
            y = row + (i - (len(scales) - 1) / 2) * 0.24
            colour = _colour(condition, rivals)
            axes.plot([one["boot_low"], one["boot_high"]], [y, y], color=colour, lw=1.6, alpha=0.55)
            axes.plot(one["rate"], y, _MARKERS[scale], color=colour, ms=4.6, mec=PAPER, mew=0.7)
    axes.axvline(0.5, color=MUTED, lw=0.8, ls=(0, (3, 3)))
    axes.set_yticks(range(len(names)), [NAMES[n] for n in names])
    axes.set_ylim(len(names) - 0.45, -0.55)
    _percent_axis(axes)
    axes.set_xlabel("nearer to native than deletion, % of firings", loc="right")
    for scale in scales:
        axes.plot([], [], _MARKERS[scale], color=MUTED, ms=4.6, label=SCALE_NAMES[scale])
    _legend(figure, len(scales))
    return _svg(figure, f"Win rates against deletion: {name}")


def kl_figure(wide: pd.DataFrame, scale: str, floor: float, rivals: Sequence[str] = (), name: str = "") -> str:
    """Distribution over firings of the KL of every condition, log axis; the floor is shaded where it is in sight."""
    rows = {"delete": _values(wide["delete"])} | _scaled(wide, scale)
    figure, axes = _panel(1.65 + 0.16 * len(rows))
    lowest = _boxes(axes, rows, rivals)
    axes.axvline(float(np.median(rows["delete"])), color=MUTED, lw=0.8, ls=(0, (3, 3)))
    if floor > lowest / 100:
        axes.axvspan(lowest / 1000, floor, color=GRID, alpha=0.6, lw=0)
        axes.set_xlim(left=lowest / 2)
    axes.set_xlabel("KL from native, nats (log scale)", loc="right")
    return _svg(figure, f"KL by condition at scale {scale}: {name}")


def ratio_figure(wide: pd.DataFrame, scale: str, rivals: Sequence[str] = (), name: str = "") -> str:
    """Distribution over firings of KL(condition) / KL(delete) on the same firing, log axis. Left of 1: a win."""
    deletion = _values(wide["delete"])
    rows = {condition: kl / deletion for condition, kl in _scaled(wide, scale).items()}
    figure, axes = _panel(1.5 + 0.16 * len(rows))
    _boxes(axes, rows, rivals)
    axes.axvline(1, color=MUTED, lw=0.8, ls=(0, (3, 3)))
    low, high = axes.get_xlim()
    steps = next(s for s in (10, 2, 2**0.5, 1.2, 1.1) if s == 1.1 or high / low > s**2.5)
    powers = range(math.ceil(math.log(low, steps)), math.floor(math.log(high, steps)) + 1)
    axes.set_xticks([steps**i for i in powers], [f"{steps**i:.2g}" for i in powers])
    axes.minorticks_off()
    axes.set_xlabel("KL / KL of deletion, same firing (log scale)", loc="right")
    return _svg(figure, f"KL relative to deletion at scale {scale}: {name}")


def _values(column: Any) -> np.ndarray:
    """A column on a log axis: exact zeros become 1e-16."""
    return np.maximum(np.asarray(column, dtype=float), 1e-16)


def _scaled(wide: pd.DataFrame, scale: str) -> dict[str, np.ndarray]:
    """The atom and the controls that were run at `scale`."""
    names = [name for name in ("atom", *CONTROLS) if f"{name}/{scale}" in wide]
    return {name: _values(wide[f"{name}/{scale}"]) for name in names}


def _boxes(axes: Axes, rows: dict[str, np.ndarray], rivals: Sequence[str]) -> float:
    """A line from 5 to 95 %, a bar between quartiles and a tick at the median, per row; returns the lowest end."""
    ends = []
    for row, (condition, values) in enumerate(rows.items()):
        low, q1, median, q3, high = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])
        colour = _colour(condition, rivals)
        axes.plot([low, high], [row, row], color=colour, lw=1.1, alpha=0.6)
        axes.plot([q1, q3], [row, row], color=colour, lw=7, alpha=0.4, solid_capstyle="butt")
        axes.plot(median, row, "|", color=colour, ms=11, mew=2.2)
        ends.append(float(low))
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), [NAMES[condition] for condition in rows])
    axes.set_ylim(len(rows) - 0.45, -0.6)
    axes.grid(axis="x", color=GRID, lw=0.6)
    axes.set_axisbelow(True)
    return min(ends)


def quartile_figure(summary: Summary, scale: str, rivals: Sequence[str] = (), name: str = "") -> str:
    """Win rate against deletion by quartile of the deletion effect;

    the atom with its interval, controls as lines.
    """
    table: Any = summary.quartiles
    table = table[table["scale"] == scale]
    figure, axes = _panel(2.35)
    ends = []
    for condition in [c for c in (*CONTROLS, "atom") if (table["condition"] == c).any()]:
        one = table[table["condition"] == condition]
        colour = _colour(condition, rivals)
        x, y = one["quartile"].to_numpy(), one["rate"].to_numpy()
        strong = condition == "atom" or condition in rivals
        if condition == "atom":
            axes.fill_between(x, one["boot_low"], one["boot_high"], color=colour, alpha=0.16, lw=0)
        axes.plot(x, y, "-o", color=colour, lw=1.9 if strong else 0.9, ms=4 if strong else 2.5)
        ends.append((float(y[-1]), NAMES[condition], colour))
    _label_ends(axes, ends, x=4.12, gap=0.085)
    axes.plot([0.8, 4.05], [0.5, 0.5], color=MUTED, lw=0.8, ls=(0, (3, 3)))
    medians = table[table["condition"] == "atom"]["delete_median"]
    axes.set_xticks([1, 2, 3, 4], [f"Q{q}\n{number(value)}" for q, value in zip((1, 2, 3, 4), medians)])
    axes.set_xlim(0.8, 6.1)
    axes.set_ylim(-0.03, 1.03)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "50 %", "", "100 %"])
    axes.set_xlabel("quartile of the deletion effect (median KL, nats)", loc="left")
    axes.spines["bottom"].set_bounds(0.8, 4.2)
    return _svg(figure, f"Win rate by deletion effect at scale {scale}: {name}")


def cosine_figure(summary: Summary, scale: str, name: str = "") -> str:
    """Per atom: win rate against deletion over the median cosine of atom and write; area is the number of firings."""
    table: Any = summary.atoms
    table = table[table["scale"] == scale]
    figure, axes = _panel(2.1)
    axes.axvspan(0.5, 1.02, color=GRID, alpha=0.45, lw=0)
    axes.scatter(table["cosine"], table["rate"], s=4 + 3 * table["n"], color=ATOM, alpha=0.5, lw=0)
    axes.axhline(0.5, color=MUTED, lw=0.8, ls=(0, (3, 3)))
    axes.set_xlim(min(-0.05, float(table["cosine"].min()) - 0.05), 1.02)
    axes.set_ylim(-0.05, 1.05)
    axes.set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    axes.set_xlabel("median cosine of atom and native write; shaded: > 1/2")
    return _svg(figure, f"Win rate of each atom by cosine at scale {scale}: {name}")


def half_life_figure(points: Sequence[HeadPoint]) -> str:
    """Win rate of the atom against deletion by the memory of the head: filled write-trained, open state-trained."""
    figure, axes = _panel(2.5)
    for point in points:
        written = point.target == "write"
        colour = ATOM if written else RIVAL
        axes.plot([point.half_life] * 2, [point.low, point.high], color=colour, lw=1.4, alpha=0.5)
        if point.control is not None:
            axes.plot(point.half_life, point.control, "_", color=colour, ms=11, mew=1.4)
        marker = ">" if point.capped else "o"
        face = colour if written else PAPER
        axes.plot(point.half_life, point.rate, marker, color=colour, mfc=face, ms=6)
    axes.axhline(0.5, color=MUTED, lw=0.8, ls=(0, (3, 3)))
    axes.set_xscale("log", base=2)
    lives = [point.half_life for point in points]
    axes.set_xlim(min(lives) / 1.5, max(lives) * 1.5)
    low, high = np.log2(axes.get_xlim())
    ticks = [2.0**i for i in range(int(np.ceil(low)), int(np.floor(high)) + 1)]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, 1.03)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "50 %", "", "100 %"])
    axes.grid(axis="y", color=GRID, lw=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("half-life of a write in the head, tokens")
    axes.plot([], [], "o", color=ATOM, label="write-trained")
    axes.plot([], [], "o", color=RIVAL, mfc=PAPER, label="state-trained")
    axes.plot([], [], "_", color=MUTED, ms=9, mew=1.4, label="best control")
    _legend(figure, 3)
    return _svg(figure, "Win rate by the memory of the head")


def steps_figure(steps: pd.DataFrame, column: str, scale: str, rivals: Sequence[str] = (), name: str = "") -> str:
    """Medians over firings of `column` of `multistep.multistep_divergence`, by tokens after t; on a log axis if they
    span more than a factor of ten.

    A cosine is drawn as 1 - cosine, so that both columns read "distance from native".
    """
    table: Any = steps[steps["scale"].isin([scale, "none"])]
    distance = 1 - table[column] if column == "residual_cosine" else table[column]
    medians: Any = table.assign(distance=distance).groupby(["condition", "step"])["distance"].median().unstack("step")
    figure, axes = _panel(2.5)
    ends, last = [], int(medians.columns.max())
    shown = medians.loc[[c for c in (*CONTROLS, "delete", "atom") if c in medians.index]].clip(lower=1e-16)
    log = shown.max(axis=None) > 10 * shown.min(axis=None)
    for condition, y in shown.iterrows():
        colour, strong = _colour(condition, rivals), condition in ("atom", "delete", *rivals)
        axes.plot(y.index, y, "-o", color=colour, lw=1.9 if strong else 0.9, ms=3.5 if strong else 2)
        ends.append((math.log10(y[last]) if log else y[last], NAMES[condition], colour))
    if log:
        axes.set_yscale("log")
        axes.minorticks_off()
        height = math.log10(axes.get_ylim()[1] / axes.get_ylim()[0])
    else:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(lambda value, _: number(value))
        height = axes.get_ylim()[1]
    _label_ends(axes, ends, x=last * 1.04, gap=0.075 * height, log=log)
    axes.set_xlim(-0.2, last * 1.55)
    axes.spines["bottom"].set_bounds(-0.2, last)
    axes.set_xticks(range(0, last + 1, 2))
    axes.set_xlabel("tokens after t", loc="left")
    axes.tick_params(axis="y", labelcolor=MUTED)
    words = {"state_gap": "change of the state", "residual_cosine": "1 - cosine of the residual stream"}
    return _svg(figure, f"Median {words[column]} by tokens after t, at scale {scale}: {name}")


def number(x: float) -> str:
    """Three significant digits; powers of ten below 0.001; a dash for NaN."""
    if x == 0 or math.isnan(x):
        return "0" if x == 0 else "–"
    if abs(x) < 1e-3:
        exponent = math.floor(math.log10(abs(x)))
        return f"{x / 10**exponent:.1f}·10{str(exponent).translate(_SUPERSCRIPT)}"
    return f"{x:.3g}"


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _panel(height: float) -> tuple[Figure, Axes]:
    """A figure of a phone's width, in inches of 100 units."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.9, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    return figure, axes


def _colour(name: str, rivals: Sequence[str]) -> str:
    if name == "atom":
        return ATOM
    return RIVAL if name in rivals else INK if name == "delete" else SOFT


def _percent_axis(axes: Axes) -> None:
    axes.set_xlim(-0.02, 1.02)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
    axes.grid(axis="x", color=GRID, lw=0.6)
    axes.set_axisbelow(True)


def _legend(figure: Figure, columns: int) -> None:
    figure.legend(
        loc="outside upper left",
        ncols=columns,
        frameon=False,
        fontsize=8,
        handletextpad=0.3,
        columnspacing=1.2,
        borderaxespad=0.1,
        labelcolor=MUTED,
    )


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]], *, x: float, gap: float, log: bool = False) -> None:
    """Names at the ends of lines, moved apart so that they do not overlap. With `log`, heights are log10."""
    at = -np.inf
    for y, name, colour in sorted(ends):
        at = max(y, at + gap)
        axes.text(x, 10**at if log else at, name, color=colour, fontsize=8, va="center")


def _svg(figure: Figure, title: str) -> str:
    """The figure as an SVG element: CSS variables for colours, no fixed size, a title for screen readers.

    Ids inside are made from the title, which must therefore be unique in a page.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for placeholder, variable in _VARIABLES.items():
        text = text.replace(placeholder, f"var(--{variable})")
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 role="img" width="100%"', text, count=1)
    text = re.sub(r"font: ([^;\"]*?)px [^;\"]*", r"font-size: \1px", text)
    return re.sub(r"(<svg[^>]*>)", lambda tag: f"{tag[1]}<title>{html.escape(title)}</title>", text, count=1)
