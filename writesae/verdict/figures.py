"""Panels of the report as inline SVG that follows the page's colours, light or dark.

A panel is drawn with placeholder colours, which are then replaced by CSS variables; its text stays text. One panel is
about as wide as a phone, so that a page can lay panels out in a grid. Evaluations call the general panels: `intervals`,
`scatter`, `curves`, `boxes`, `histograms`; the substitution test has three of its own.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import ArrayLike, NDArray

from writesae.verdict import statistics as stats
from writesae.verdict.format import number, percent
from writesae.verdict.names import NAMES, SCALE_NAMES

_VARIABLES = {
    "#010203": "ink",
    "#010204": "muted",
    "#010205": "grid",
    "#010206": "atom",
    "#010207": "rival",
    "#010208": "paper",
    "#010209": "soft",
}
INK, MUTED, GRID, ATOM, CONTROL, PAPER, SOFT = _VARIABLES
COLOURS = {"atom": ATOM, "control": CONTROL, "ink": INK, "soft": SOFT, "muted": MUTED}
"""Colours by what they say: the atom; a control that confounds it; deletion or another plain line; the rest."""

_MARKERS = {"coefficient": "o", "matched": "s", "least_squares": "D", "common": "^"}
_STYLE: dict[str, object] = {
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
_DASHED = (0, (3, 3))
_HOVER = "hover:"
"""Marks the ids that are texts to show."""


class Row(NamedTuple):
    """One line of `intervals`."""

    name: str
    mean: float
    low: float
    high: float
    colour: str = "soft"
    """Key of `COLOURS`."""


class Line(NamedTuple):
    """One line of `curves`, with a band where there is one."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = "soft"
    band: tuple[Sequence[float], Sequence[float]] | None = None


# ---------------------------------------------------------------------------------------------- general panels


def intervals(
    rows: Sequence[Row],
    label: str,
    title: str,
    *,
    chance: float = 0.0,
    percent: bool = False,
    least: float | None = None,
) -> str:
    """An estimate and its interval in each row; a dashed line at `chance`. What is below `least` is drawn there, as a
    triangle."""
    figure, axes = _panel(0.75 + 0.26 * len(rows))
    for y, row in enumerate(rows):
        colour = COLOURS[row.colour]
        mean, low, high = (x if least is None else max(x, least) for x in (row.mean, row.low, row.high))
        lines = axes.plot([low, high], [y, y], color=colour, lw=2.0, alpha=0.55)
        lines += axes.plot(mean, y, "o" if mean == row.mean else "<", color=colour, ms=5, mec=PAPER, mew=0.7)
        _hover(lines, f"{row.name}: {number(row.mean)} [{number(row.low)}, {number(row.high)}]")
    axes.axvline(chance, color=MUTED, lw=0.8, ls=_DASHED)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.set_ylim(len(rows) - 0.45, -0.55)
    if percent:
        axes.set_xlim(-0.02, 1.02)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
    else:
        axes.locator_params(axis="x", nbins=5)
    _grid(axes, "x")
    axes.set_xlabel(label, loc="right")
    return _svg(figure, title)


def bars(names: Sequence[str], values: Mapping[str, Sequence[float]], label: str, title: str) -> str:
    """Groups of horizontal bars: one group for each name (down), one bar for each entry of `values`."""
    figure, axes = _panel(0.9 + 0.13 * len(names) * (len(values) + 1))
    shades = {NAMES["atom"]: ATOM, NAMES["native"]: INK, NAMES["delete"]: CONTROL}
    for n, (key, numbers) in enumerate(values.items()):
        heights = [y + (n - (len(values) - 1) / 2) * 0.8 / len(values) for y in range(len(names))]
        drawn = axes.barh(heights, numbers, 0.8 / len(values), color=shades.get(key, SOFT), label=key)
        for name, value, bar in zip(names, numbers, drawn):
            _hover([bar], f"{name}, {key}: {number(value)}")
    axes.set_yticks(range(len(names)), [name or " " for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    _grid(axes, "x")
    axes.set_xlabel(label, loc="right")
    _legend(figure, 2)
    return _svg(figure, title)


def scatter(
    x: ArrayLike,
    y: ArrayLike,
    labels: tuple[str, str],
    title: str,
    *,
    colour: str = "atom",
    size: float = 12,
    symlog: bool = False,
) -> str:
    """Points over the diagonal: what was expected (across) against what was measured (up).

    With `symlog` both axes are linear around 0 and logarithmic beyond, and have one scale.
    """
    across, up = np.asarray(x, float), np.asarray(y, float)
    figure, axes = _panel(3.4 if symlog else 2.6)
    if symlog:
        linear = max(float(np.median(np.abs(up))), 1e-12)
        edge = 1.5 * max(float(np.abs(up).max()), float(np.abs(across).max()), linear)
        ends, ticks = [-edge, edge], _powers(linear, edge)
        for set_scale, set_limits, set_ticks in (
            (axes.set_xscale, axes.set_xlim, axes.set_xticks),
            (axes.set_yscale, axes.set_ylim, axes.set_yticks),
        ):
            set_scale("symlog", linthresh=linear)
            set_limits(-edge, edge)
            set_ticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(color=GRID, lw=0.5)
        axes.set_axisbelow(True)
    else:
        ends = [float(min(across.min(), 0)), float(max(across.max(), 0))]
        axes.axhline(0, color=GRID, lw=0.8)
        axes.locator_params(nbins=5)
    axes.plot(ends, ends, color=MUTED, lw=0.8, ls=_DASHED)
    axes.scatter(across, up, s=size, color=COLOURS[colour], alpha=0.5, lw=0)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1], color=MUTED)
    axes.tick_params(axis="y", labelcolor=MUTED)
    return _svg(figure, title)


def curves(
    lines: Sequence[Line],
    label: str,
    title: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    percent: bool = False,
    even: bool = False,
    chance: float | None = None,
    lowest: float | None = None,
    ticks: Mapping[float, str] | None = None,
) -> str:
    """Lines that are named at their right end.

    Args:
        label: of the x axis.
        even: place the points at even distances, whatever their x.
        chance: a dashed horizontal line.
        lowest: values below it are drawn at the lower edge, as triangles (an R^2 of -500, say).
        ticks: names of points on the x axis, where they are not their numbers.
    """
    figure, axes = _panel(2.5)
    points = sorted({x for line in lines for x in line.x})
    place = {x: float(i) if even else x for i, x in enumerate(points)}
    ends, low, high = [], math.inf, -math.inf
    for line in lines:
        colour, strong = COLOURS[line.colour], line.colour in ("atom", "control", "ink")
        x = np.array([place[value] for value in line.x])
        y = np.asarray(line.y, float)
        y = np.maximum(y, 1e-16) if log_y else y
        if line.band is not None:
            axes.fill_between(x, *line.band, color=colour, alpha=0.16, lw=0)
        hidden = np.zeros(len(y), bool) if lowest is None else y < lowest
        y = np.where(hidden, lowest, y) if lowest is not None else y
        axes.plot(x, y, "-", color=colour, lw=1.9 if strong else 0.9)
        axes.plot(x[~hidden], y[~hidden], "o", color=colour, ms=3.5 if strong else 2.5)
        axes.plot(x[hidden], y[hidden], "v", color=colour, ms=5)
        low, high = min(low, float(y.min())), max(high, float(y.max()))
        ends.append((math.log10(y[-1]) if log_y else float(y[-1]), line.name, colour))
    if chance is not None:
        axes.axhline(chance, color=MUTED, lw=0.8, ls=_DASHED)
    if log_x:
        axes.set_xscale("log", base=2)
    if log_y:
        axes.set_yscale("log")
    names = [(ticks or {}).get(x, number(x)) for x in points]
    step = max(1, math.ceil(len(points) / 8))
    axes.set_xticks([place[x] for x in points][::step], names[::step])
    axes.minorticks_off()
    first, last = place[points[0]], place[points[-1]]
    height = math.log10(high / max(low, 1e-16)) if log_y else 1.0 if percent else high - low
    at = last * (last / first) ** 0.04 if log_x else last + 0.04 * (last - first)
    _label_ends(axes, ends, x=at, gap=0.075 * (height or 1.0), log=log_y)
    axes.set_xlim(right=last * (last / first) ** 0.6 if log_x else last + 0.6 * (last - first or 1))
    if percent:
        _percents(axes)
    elif lowest is not None:
        axes.set_ylim(lowest - 0.08, 1.08)
        axes.set_yticks([0, 0.5, 1])
    elif not log_y:
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    _grid(axes, "y")
    axes.tick_params(axis="y", labelcolor=MUTED)
    axes.set_xlabel(label, loc="left")
    return _svg(figure, title)


def boxes(
    rows: Mapping[str, ArrayLike],
    label: str,
    controls: Sequence[str],
    title: str,
    *,
    floor: float = 0.0,
    line: float | None = None,
) -> str:
    """Distributions on a log axis: a line from 5 to 95 %, a bar between quartiles, a tick at the median.

    Args:
        rows: values by condition.
        controls: conditions in the colour of a control that is not beaten.
        floor: shaded below, where it is in sight.
        line: a dashed vertical line; by default at the median of deletion.
    """
    values = {name: np.maximum(np.asarray(x, float), 1e-16) for name, x in rows.items()}
    figure, axes = _panel(1.6 + 0.16 * len(values))
    lowest = math.inf
    for row, (condition, x) in enumerate(values.items()):
        low, q1, median, q3, high = np.quantile(x, [0.05, 0.25, 0.5, 0.75, 0.95])
        colour = _colour(condition, controls)
        axes.plot([low, high], [row, row], color=colour, lw=1.1, alpha=0.6)
        axes.plot([q1, q3], [row, row], color=colour, lw=7, alpha=0.4, solid_capstyle="butt")
        axes.plot(median, row, "|", color=colour, ms=11, mew=2.2)
        lowest = min(lowest, float(low))
    axes.set_xscale("log")
    axes.set_yticks(range(len(values)), [_two_lines(NAMES.get(name, name)) for name in values])
    axes.set_ylim(len(values) - 0.45, -0.6)
    if line is None and "delete" in values:
        line = float(np.median(values["delete"]))
    if line is not None:
        axes.axvline(line, color=MUTED, lw=0.8, ls=_DASHED)
    if floor > lowest / 100:
        axes.axvspan(lowest / 1000, floor, color=GRID, alpha=0.6, lw=0)
        axes.set_xlim(left=lowest / 2)
    left, right = axes.get_xlim()
    if right / left < 1000:  # the powers of ten alone would leave the axis without numbers
        steps = (10, 5, 2, 2**0.5, 1.2, 1.1)
        step = next((s for s in steps if math.log(right / left, s) >= 2), 1.1)
        powers = range(math.ceil(math.log(left, step)), math.floor(math.log(right, step)) + 1)
        thin = max(1, math.ceil(len(powers) / 4))
        axes.set_xticks([step**i for i in powers[::thin]], [number(step**i) for i in powers[::thin]])
        axes.minorticks_off()
    _grid(axes, "x")
    axes.set_xlabel(f"{label} (log scale)", loc="right")
    return _svg(figure, title)


def histograms(
    samples: Mapping[str, tuple[ArrayLike, str]], label: str, title: str, *, line: float | None = None
) -> str:
    """Counts of several samples over shared bins, the first one filled; samples are (values, colour) by name."""
    arrays = {name: np.asarray(x, float) for name, (x, _) in samples.items()}
    low = min(-0.1, *(float(x.min()) for x in arrays.values()))
    high = max(0.2, *(float(x.max()) for x in arrays.values()))
    edges = np.linspace(low, high, 41)
    figure, axes = _panel(2.3)
    counts = {name: np.histogram(x, edges)[0] for name, x in arrays.items()}
    for n, (name, count) in enumerate(counts.items()):
        colour = COLOURS[samples[name][1]]
        if n == 0:
            axes.stairs(count, edges, color=colour, label=name, fill=True, alpha=0.35, lw=0)
        else:
            axes.stairs(count, edges, color=colour, label=name, lw=1.2)
    tallest = next(iter(counts.values())).max()
    axes.set_ylim(0, min(axes.get_ylim()[1], 2.5 * tallest))  # a null can be a single spike
    if line is not None:
        axes.axvline(line, color=MUTED, lw=0.8, ls=_DASHED)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_xlabel(label)
    axes.tick_params(axis="y", labelcolor=MUTED)
    _legend(figure, 3)
    return _svg(figure, title)


# ---------------------------------------------------------------------------------------------- substitution


def recovered_shares(table: pd.DataFrame, controls: Sequence[str], title: str) -> str:
    """Share of a deletion's effect that each condition takes back, at every scale; what is below -50 % is drawn at the
    edge.

    Args:
        table: rows of `substitution.comparisons` against deletion: scale, a, recovered, recovered_low, recovered_high.
        controls: conditions in the colour of a control that is not beaten.
    """
    axis = _DotAxis((-0.5, 1.0), 0.0, "% of the deletion's effect taken back", "Recovered share")
    return _dots(table, ("recovered", "recovered_low", "recovered_high"), controls, axis, title)


def win_rates(table: pd.DataFrame, controls: Sequence[str], title: str) -> str:
    """Share of firings on which each condition is nearer to the native model than deletion, at every scale.

    Args:
        table: rows of `substitution.comparisons` against deletion: scale, a, rate, low, high.
        controls: conditions in the colour of a control that is not beaten.
    """
    axis = _DotAxis((0.0, 1.0), 0.5, "% of firings nearer to native than deletion", "Win rates against deletion")
    return _dots(table, ("rate", "low", "high"), controls, axis, title)


class _DotAxis(NamedTuple):
    ends: tuple[float, float]
    """What is below the lower one is drawn there, as a triangle."""
    chance: float
    label: str
    name: str


def _dots(
    table: pd.DataFrame, columns: tuple[str, str, str], controls: Sequence[str], axis: _DotAxis, title: str
) -> str:
    """An estimate and its interval for each condition (down) and scale (markers)."""
    names, scales = list(dict.fromkeys(table["a"])), list(dict.fromkeys(table["scale"]))
    figure, axes = _panel(1.2 + 0.2 * len(names))
    left, right = axis.ends
    for row in table.to_dict("records"):
        mean, low, high = (max(float(row[column]), left) for column in columns)
        height = names.index(row["a"]) + (scales.index(row["scale"]) - (len(scales) - 1) / 2) * 0.24
        colour = _colour(row["a"], controls)
        lines = axes.plot([low, high], [height, height], color=colour, lw=1.6, alpha=0.55)
        marker = _MARKERS[row["scale"]] if row[columns[0]] >= left else "<"
        lines += axes.plot(mean, height, marker, color=colour, ms=4.6, mec=PAPER, mew=0.7)
        values = [percent(float(row[column])) for column in columns]
        _hover(lines, f"{NAMES[row['a']]}, {SCALE_NAMES[row['scale']]}: {values[0]} [{values[1]}, {values[2]}]")
    axes.axvline(axis.chance, color=MUTED, lw=0.8, ls=_DASHED)
    axes.set_yticks(range(len(names)), [_two_lines(NAMES[name]) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(left - 0.02 * (right - left), right + 0.02 * (right - left))
    ticks = np.linspace(left, right, 5 if left == 0 else 4)
    axes.set_xticks(ticks, [f"{100 * tick:.0f}" for tick in ticks])
    _grid(axes, "x")
    axes.set_xlabel(axis.label, loc="right")
    for scale in scales:
        axes.plot([], [], _MARKERS[scale], color=MUTED, ms=4.6, label=SCALE_NAMES[scale])
    _legend(figure, len(scales))
    return _svg(figure, f"{axis.name}: {title}")


def quartiles(
    rows: Mapping[str, pd.Series], deletion: pd.Series, clusters: pd.Series, controls: Sequence[str], title: str
) -> str:
    """Win rate against deletion by quartile of the deletion effect; the atom with its interval, controls as lines.
    Fewer than four firings leave quartiles out."""
    quartile = stats.quartile(deletion)
    parts, lines = sorted(int(q) for q in set(quartile)), []
    for condition in [name for name in rows if name != "delete"]:
        rates = [
            stats.win_rate(
                rows[condition][quartile == q], deletion[quartile == q], clusters[quartile == q]
            ).over_clusters
            for q in parts
        ]
        colour = "atom" if condition == "atom" else "control" if condition in controls else "soft"
        band = ([r.low for r in rates], [r.high for r in rates]) if condition == "atom" else None
        lines.append(Line(NAMES[condition].split(" (")[0], parts, [r.mean for r in rates], colour, band))
    ticks = {float(q): f"Q{q}" for q in parts}
    low, high = (number(float(deletion[quartile == q].median())) for q in (parts[0], parts[-1]))
    label = f"quartile of the deletion effect\n(median KL {low} to {high} nats)"
    lines.sort(key=lambda line: line.colour == "atom")
    return curves(lines, label, f"Win rate by deletion effect: {title}", percent=True, chance=0.5, ticks=ticks)


def wins_by_cosine(cosine: pd.Series, win: pd.Series, atom: pd.Series, title: str) -> str:
    """Per atom: win rate against deletion over the median cosine of atom and write; area is the number of firings."""
    grouped = pd.DataFrame({"cosine": cosine, "win": win, "atom": atom}).groupby("atom")
    across, rate, n = grouped["cosine"].median(), grouped["win"].mean(), grouped.size()
    figure, axes = _panel(2.1)
    axes.axvspan(0.5, 1.02, color=GRID, alpha=0.45, lw=0)
    axes.scatter(across, rate, s=4 + 3 * n, color=ATOM, alpha=0.5, lw=0)
    axes.axhline(0.5, color=MUTED, lw=0.8, ls=_DASHED)
    axes.set_xlim(min(-0.05, float(across.min()) - 0.05), 1.02)
    _percents(axes)
    axes.set_xlabel("median cosine of atom and native write; shaded: > 1/2")
    return _svg(figure, f"Win rate of each atom by cosine: {title}")


# ---------------------------------------------------------------------------------------------- drawing


def _panel(height: float) -> tuple[Figure, Axes]:
    """A figure of a phone's width, in inches of 100 units."""
    with matplotlib.rc_context(_STYLE):  # pyright: ignore[reportArgumentType]  # matplotlib types keys as literals
        figure = Figure(figsize=(3.9, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    return figure, axes


def _two_lines(name: str) -> str:
    """What a name says in brackets goes below it: the axis needs the width."""
    return name.replace(" (", "\n(")


def _colour(name: str, controls: Sequence[str]) -> str:
    if name == "atom":
        return ATOM
    return CONTROL if name in controls else INK if name == "delete" else SOFT


def _grid(axes: Axes, axis: str) -> None:
    axes.grid(axis="x" if axis == "x" else "y", color=GRID, lw=0.6)
    axes.set_axisbelow(True)


def _percents(axes: Axes) -> None:
    axes.set_ylim(-0.03, 1.03)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "50 %", "", "100 %"])


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
    at = -math.inf
    for y, name, colour in sorted(ends):
        at = max(y, at + gap)
        axes.text(x, 10**at if log else at, name, color=colour, fontsize=8, va="center")


def _powers(linear: float, edge: float) -> list[float]:
    """0 and up to three powers of ten on either side, of those beyond the linear part."""
    powers: NDArray[np.float64] = np.arange(np.ceil(np.log10(linear)), np.floor(np.log10(edge)) + 1)
    if len(powers) > 3:
        powers = powers[:: int(np.ceil(len(powers) / 3))]
    positive = [float(10.0**power) for power in powers]
    return [*(-value for value in reversed(positive)), 0.0, *positive]


def _hover(artists: Sequence[Artist], text: str) -> None:
    """Have a browser show `text` at these artists: a title of their own in the SVG, which needs no script."""
    for artist in artists:
        artist.set_gid(_HOVER + text)


def _svg(figure: Figure, title: str) -> str:
    """The figure as an SVG element: CSS variables for colours, no fixed size, a title for screen readers.

    Ids inside are made from the title, which must therefore be unique in a page.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": title}):  # pyright: ignore[reportArgumentType]
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for placeholder, variable in _VARIABLES.items():
        text = text.replace(placeholder, f"var(--{variable})")
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 role="img" width="100%"', text, count=1)
    text = re.sub(rf"<g id=([\"']){_HOVER}(.*?)\1>", r"<g><title>\2</title>", text)
    text = re.sub(r"font: ([^;\"]*?)px [^;\"]*", r"font-size: \1px", text)
    return re.sub(r"(<svg[^>]*>)", lambda tag: f"{tag[1]}<title>{html.escape(title)}</title>", text, count=1)
