"""How well predictions meet measurements: R2 without a fitted number, with one, and with one too many."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sae_lens_writesae.experiment.predictors import PREDICTORS
from sae_lens_writesae.verdict import statistics as stats

CONTROL = "shuffled"
SCORED = (*PREDICTORS, CONTROL)
CELL = ["quantity", "firing", "horizon", "rank"]
"""What the paper calls a cell: one prompt, feature and token; sizes eps are its points."""
ALL = "all"
NO_CHANGE = "scores of groups in which no measured change differs from another"
_SPLITS: Sequence[tuple[str, ...]] = ((), ("horizon",), ("rank",), ("eps",), ("horizon", "eps"))

_NAMES = ("quantity", "predictor", "horizon", "rank", "eps")
_NUMBERS = ("r2", "r2_low", "r2_high", "r2_global_scale", "global_scale", "per_cell_scale", "pearson", "sign_rate")
_NUMBERS += ("n", "n_sequences")

#: A DataFrame inside this file: pandas' own annotations are too loose to check by.
Table = Any
Array = NDArray[np.float64]


class Fit(NamedTuple):
    """One scale for all cells, never scored on the sequences it was fitted on."""

    scale: float
    """Least squares over all rows."""
    predicted: Array
    """The prediction of each row times the scale of the other half of the sequences."""


def with_control(cells: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Add the column `shuffled`: F2's prediction for another firing at the same horizon, rank group and eps.

    It has F2's distribution and knows nothing of the firing; whatever it scores needs no formula.
    """
    table: Table = cells
    firings = np.random.default_rng(seed).permutation(np.unique(table["firing"]))
    partner = dict(zip(firings, np.roll(firings, 1)))
    keys = ["quantity", "horizon", "rank", "eps"]
    lent = table[[*keys, "firing", "F2"]].rename(columns={"firing": "partner", "F2": CONTROL})
    paired = table.assign(partner=table["firing"].map(partner)).merge(lent, on=[*keys, "partner"])
    return paired.drop(columns="partner")


def score(cells: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """The table `scores`: every predictor, over all rows and per horizon, rank group, eps, and horizon by eps.

    Groups in which every measured change is the same have no R2 and are left out.
    """
    table: Table = cells
    scaled = {predictor: _per_cell_scaled(table, predictor) for predictor in SCORED}
    rows = []
    for part, names in _groups(table):
        measured, sequence = part["measured"].to_numpy(float), part["sequence"].to_numpy()
        if np.ptp(measured) == 0:
            continue
        for predictor in SCORED:
            predicted, own = part[predictor].to_numpy(float), scaled[predictor][part.index].to_numpy(float)
            rows.append(names | {"predictor": predictor} | _scored(measured, predicted, own, sequence, seed))
    return pd.DataFrame(rows, columns=[*_NAMES, *_NUMBERS])


def unscored(cells: pd.DataFrame, scores: pd.DataFrame) -> int:
    """How many rows `score` left out."""
    return len(SCORED) * sum(1 for _ in _groups(cells)) - len(scores)


def score_cells(cells: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """The table `per_cell`: the paper's statistic, the median over cells of R2 over eps with a scale of the cell's own.

    All predictors here are proportional to eps, so that the scale leaves nothing of them: whatever they predict, the
    fit is the best line through 0, and R2 says how straight the measured curve is.
    """
    rows = []
    for predictor in SCORED:
        table: Table = cells.assign(scaled=_per_cell_scaled(cells, predictor))
        for quantity, part in table.groupby("quantity"):
            grouped = part.assign(res=(part["measured"] - part["scaled"]) ** 2).groupby(CELL)
            total = grouped["measured"].var(ddof=0) * grouped.size()
            r2 = (1 - grouped["res"].sum() / total)[total > 0]
            if r2.empty:
                continue
            sequence = grouped["sequence"].first()[r2.index]
            boot = stats.cluster_bootstrap(r2.to_numpy(), sequence.to_numpy(), stats.weighted_median, seed=seed)
            ends = {"low": boot.interval.low, "high": boot.interval.high}
            rows.append({"quantity": quantity, "predictor": predictor, "median_r2": boot.estimate, **ends, "n": boot.n})
    return pd.DataFrame(rows, columns=["quantity", "predictor", "median_r2", "low", "high", "n"])


def r2(measured: Array, predicted: Array) -> float:
    """1 - sum (m - p)^2 / sum (m - mean m)^2. 0: no better than one number for all; no lower limit."""
    return float(1 - ((measured - predicted) ** 2).sum() / ((measured - measured.mean()) ** 2).sum())


def one_scale(measured: Array, predicted: Array, sequence: NDArray[Any]) -> Fit:
    """A least-squares scale, cross-fitted: sequences are dealt into two halves, and each half is scaled by what fits
    the other."""
    half = np.searchsorted(np.unique(sequence), sequence) % 2
    own = np.array([_scale(measured[half == side], predicted[half == side]) for side in (0, 1)])
    return Fit(_scale(measured, predicted), own[1 - half] * predicted)


def _scale(measured: Array, predicted: Array) -> float:
    square = float(predicted @ predicted)
    return float(measured @ predicted) / square if square > 0 else 0.0


def _per_cell_scaled(cells: Table, predictor: str) -> Any:
    """Each prediction times the least-squares scale of its cell, fitted on the rows that it is scored on."""
    product = cells[predictor] * cells["measured"]
    keys = [cells[name] for name in CELL]
    above = product.groupby(keys).transform("sum")
    below = (cells[predictor] ** 2).groupby(keys).transform("sum")
    return cells[predictor] * (above / below.where(below > 0, np.inf))


def _groups(cells: Table) -> Iterator[tuple[Table, dict[str, str]]]:
    """All rows of a quantity, then splits of them; an axis that is not split is called `ALL`."""
    for split, (quantity, whole) in itertools.product(_SPLITS, list(cells.groupby("quantity"))):
        names = {"quantity": str(quantity), "horizon": ALL, "rank": ALL, "eps": ALL}
        if not split:
            yield whole, names
            continue
        for level, part in whole.groupby(list(split)):
            yield part, names | {axis: f"{x:g}" if axis != "rank" else str(x) for axis, x in zip(split, level)}


def _scored(measured: Array, predicted: Array, per_cell: Array, sequence: NDArray[Any], seed: int) -> dict[str, float]:
    """The numbers of one predictor on one group; `per_cell` is the prediction with a scale of each cell's own."""
    fit = one_scale(measured, predicted, sequence)
    interval = _r2_interval(measured, predicted, sequence, seed)
    return {
        "r2": r2(measured, predicted),
        "r2_low": interval.low,
        "r2_high": interval.high,
        "r2_global_scale": r2(measured, fit.predicted),
        "global_scale": fit.scale,
        "per_cell_scale": r2(measured, per_cell),
        "pearson": float(np.corrcoef(measured, predicted)[0, 1]) if np.ptp(predicted) > 0 else 0.0,
        "sign_rate": float((np.sign(measured) == np.sign(predicted)).mean()),
        "n": len(measured),
        "n_sequences": len(np.unique(sequence)),
    }


def _r2_interval(measured: Array, predicted: Array, sequence: NDArray[Any], seed: int) -> stats.Interval:
    """Cluster bootstrap of R2 by sequence. R2 is made of sums over rows, so each sequence enters by its own sums."""
    codes = np.unique(sequence, return_inverse=True)[1]
    columns = (np.ones_like(measured), measured, measured**2, (measured - predicted) ** 2)
    sums = np.stack([np.bincount(codes, column) for column in columns], 1)  # [C,4]

    def statistic(_values: Array, weights: Array) -> Array:
        count, total, square, residual = (weights @ sums).T
        return 1 - residual / (square - total**2 / count)

    clusters = np.arange(len(sums))
    return stats.cluster_bootstrap(clusters, clusters, statistic, seed=seed).interval
