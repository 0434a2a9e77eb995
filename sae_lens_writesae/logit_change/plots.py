"""Figures of the logit-change evaluation, in the manner of `sae_lens_writesae.plots`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from sae_lens_writesae.evaluation import Figure
from sae_lens_writesae.experiment.predictors import DEFINITIONS, PREDICTORS
from sae_lens_writesae.logit_change.scores import ALL, CONTROL
from sae_lens_writesae.plots import ATOM, GRID, INK, MUTED, PAPER, RIVAL, SOFT, _label_ends, _legend, _panel, _svg

_COLOURS = {"F0": RIVAL, "F1": INK, "F2": ATOM, CONTROL: SOFT}
_LOWEST = -0.25
"""R2 below this is drawn at the lower edge, as a triangle."""


def figures(tables: dict[str, pd.DataFrame], smallest: float, name: str) -> list[Figure]:
    """Predicted against measured for each formula, R2 by horizon and by eps, and R2 with a scale per cell."""
    made = [
        Figure(f"{predictor}: predicted and measured", scatter(tables["cells"], predictor, smallest, name), text)
        for predictor, text in ((p, f"{DEFINITIONS[p]}; logits at eps {smallest:g}") for p in PREDICTORS)
    ]
    scores = tables["scores"]
    return [
        *made,
        Figure("R² by horizon", by_horizon(scores, smallest, name), f"unfitted, at eps {smallest:g}"),
        Figure("F2 by size of the edit", by_eps(scores, name), "unfitted, one line per horizon"),
        Figure(
            "What a scale per cell makes of it",
            per_cell(tables, smallest, name),
            "With a scale fitted per cell, any prediction that grows with eps has an R² near 1.",
        ),
    ]


def scatter(cells: pd.DataFrame, predictor: str, eps: float, name: str = "") -> str:
    """Predicted (x) and measured (y) changes of logits at one eps, both axes linear around 0 and logarithmic beyond."""
    table: Any = cells
    own = table[(table["quantity"] == "logit") & (table["eps"] == eps)]
    x, y = own[predictor].to_numpy(float), own["measured"].to_numpy(float)
    linear = max(float(np.median(np.abs(y))), 1e-12)
    edge = 1.5 * max(float(np.abs(y).max()), float(np.abs(x).max()), linear)
    figure, axes = _panel(3.4)
    axes.plot([-edge, edge], [-edge, edge], color=MUTED, lw=0.8, ls=(0, (3, 3)))
    axes.plot(x, y, "o", color=_COLOURS[predictor], ms=2.6, alpha=0.45, mew=0)
    ticks = _ticks(linear, edge)
    for axis, set_scale, set_limits, set_ticks in (
        (axes.xaxis, axes.set_xscale, axes.set_xlim, axes.set_xticks),
        (axes.yaxis, axes.set_yscale, axes.set_ylim, axes.set_yticks),
    ):
        set_scale("symlog", linthresh=linear)
        set_limits(-edge, edge)
        set_ticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_tick_params(which="minor", length=0, labelcolor=MUTED)
    axes.grid(color=GRID, lw=0.5)
    axes.set_axisbelow(True)
    axes.set_xlabel("predicted change of the logit")
    axes.set_ylabel("measured")
    return _svg(figure, f"{predictor}, predicted against measured logit changes at eps {eps:g}: {name}")


def by_horizon(scores: pd.DataFrame, eps: float, name: str = "") -> str:
    """Unfitted R2 of each formula on logits at one eps, by horizon, with its interval."""
    table: Any = scores
    own = table[
        (table["quantity"] == "logit")
        & (table["eps"] == f"{eps:g}")
        & (table["rank"] == ALL)
        & (table["horizon"] != ALL)
    ]
    figure, axes = _panel(2.5)
    ends, ticks = [], []
    for predictor in PREDICTORS:
        rows = own[own["predictor"] == predictor]
        rows = rows.iloc[np.argsort(rows["horizon"].astype(float))]
        at, y = np.arange(len(rows)), rows["r2"].to_numpy(float)
        colour, ticks = _COLOURS[predictor], rows["horizon"].tolist()
        axes.vlines(
            at,
            np.clip(rows["r2_low"], _LOWEST, 1),
            np.clip(rows["r2_high"], _LOWEST, 1),
            color=colour,
            lw=1.2,
            alpha=0.5,
        )
        _line(axes, at, y, colour)
        ends.append((float(max(y[-1], _LOWEST)), predictor, colour))
    _frame(axes, ticks, ends, "tokens from the write to the prediction")
    return _svg(figure, f"R2 of each formula by horizon at eps {eps:g}: {name}")


def by_eps(scores: pd.DataFrame, name: str = "") -> str:
    """F2's unfitted R2 on logits by eps, one line per horizon."""
    table: Any = scores
    own = table[(table["quantity"] == "logit") & (table["predictor"] == "F2") & (table["eps"] != ALL)]
    own = own[own["horizon"] != ALL]
    figure, axes = _panel(2.5)
    ends, ticks = [], []
    for horizon, rows in sorted(own.groupby("horizon"), key=lambda item: float(item[0])):
        rows = rows.iloc[np.argsort(rows["eps"].astype(float))]
        y, ticks = rows["r2"].to_numpy(float), rows["eps"].tolist()
        _line(axes, np.arange(len(y)), y, ATOM)
        ends.append((float(max(y[-1], _LOWEST)), f"t + {horizon}", ATOM))
    _frame(axes, ticks, ends, "eps")
    return _svg(figure, f"R2 of F2 by eps and horizon: {name}")


def per_cell(tables: dict[str, pd.DataFrame], eps: float, name: str = "") -> str:
    """Unfitted R2 at one eps, and the median R2 over eps with a scale of each cell's own, for each formula."""
    scores: Any = tables["scores"]
    cells: Any = tables["per_cell"]
    own = scores[
        (scores["quantity"] == "logit")
        & (scores["eps"] == f"{eps:g}")
        & (scores["horizon"] == ALL)
        & (scores["rank"] == ALL)
    ].set_index("predictor")
    medians = cells[cells["quantity"] == "logit"].set_index("predictor")
    names = [predictor for predictor in (*PREDICTORS, CONTROL) if predictor in own.index and predictor in medians.index]
    figure, axes = _panel(1.75)
    for row, predictor in enumerate(names):
        colour, value = _COLOURS[predictor], float(own.loc[predictor, "r2"])
        marker = "o" if value >= _LOWEST else "<"
        axes.plot(max(value, _LOWEST), row, marker, color=colour, ms=5.5, mec=PAPER, mew=0.7)
        axes.plot(float(medians.loc[predictor, "median_r2"]), row, "s", color=colour, mfc=PAPER, ms=5)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(_LOWEST - 0.05, 1.08)
    axes.set_xticks([0, 0.5, 1])
    axes.grid(axis="x", color=GRID, lw=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("R²", loc="right")
    axes.plot([], [], "o", color=MUTED, ms=5, label=f"unfitted, eps {eps:g}")
    axes.plot([], [], "s", color=MUTED, mfc=PAPER, ms=5, label="scale per cell, median")
    _legend(figure, 2)
    return _svg(figure, f"R2 without a fitted number and with a scale per cell: {name}")


def _line(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str) -> None:
    """A line with dots; what lies below the lower edge is marked there."""
    axes.plot(x, np.maximum(y, _LOWEST), "-", color=colour, lw=1.6)
    below = y < _LOWEST
    axes.plot(x[~below], y[~below], "o", color=colour, ms=4)
    axes.plot(x[below], np.full(below.sum(), _LOWEST), "v", color=colour, ms=5)


def _frame(axes: Axes, ticks: list[str], ends: list[tuple[float, str, str]], label: str) -> None:
    """Axes of a figure of R2 over evenly spaced levels, names at the ends of lines."""
    last = len(ticks) - 1
    _label_ends(axes, ends, x=last + 0.12, gap=0.11)
    axes.axhline(0, color=MUTED, lw=0.8, ls=(0, (3, 3)))
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set_xlim(-0.2, last + 0.75)
    axes.set_ylim(_LOWEST - 0.08, 1.08)
    axes.set_yticks([0, 0.5, 1])
    axes.grid(axis="y", color=GRID, lw=0.6)
    axes.set_axisbelow(True)
    axes.set_ylabel("R²")
    axes.set_xlabel(label, loc="left")


def _ticks(linear: float, edge: float) -> list[float]:
    """0 and up to three powers of ten on either side, of those beyond the linear part."""
    powers = np.arange(np.ceil(np.log10(linear)), np.floor(np.log10(edge)) + 1)
    if len(powers) > 3:
        powers = powers[:: int(np.ceil(len(powers) / 3))]
    positive = [float(10.0**power) for power in powers]
    return [*(-value for value in reversed(positive)), 0.0, *positive]
