"""How well predictions meet measurements: R^2 without a fitted number, with one, and with one for each cell.

R^2 is 1 - sum (m - p)^2 / sum (m - mean m)^2: 0 is no better than one number for all rows, and it has no lower limit.

A table of *cells* has one row per firing, horizon, rank group and eps: the change that was `measured`, and one column
of predicted changes per formula.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from sklearn.metrics import r2_score

from writesae.dictionary.estimates import Array, Estimate
from writesae_study.verdict.statistics import estimate

CONTROL_COLUMN = "shuffled"
"""Name of the control: a formula's prediction for another firing."""
CELL = ["firing", "horizon", "rank"]
"""What the paper calls a cell: one prompt, feature and token. The sizes eps are its points."""
_SPLITS: tuple[tuple[str, ...], ...] = ((), ("horizon",), ("rank",), ("eps",), ("horizon", "eps"))

SCORES: dict[str, str] = {
    "predictor": "F0, F1, F2, or the control",
    "horizon": "one horizon, or all",
    "rank": "one rank group, or all",
    "eps": "one size, or all",
    "r2": "R^2 about the mean with nothing fitted; 0 is no better than one number for all rows",
    "r2_low": "lower end of its 95% interval over sequences",
    "r2_high": "upper end of its 95% interval over sequences",
    "r2_global_scale": "R^2 with one scale for all rows, each half of the sequences scaled by the other's",
    "n": "number of rows",
}
"""Columns of `scores_table`."""


def r2_estimate(
    measured: ArrayLike, predicted: ArrayLike, clusters: ArrayLike, *, rival: ArrayLike | None = None, seed: int = 0
) -> Estimate:
    """R^2 with its interval over clusters; with a `rival` prediction, the paired difference of the two R^2.

    R^2 is made of sums over rows, so each cluster enters the bootstrap by its own sums. Cost: n_resamples * clusters.
    """
    m = np.asarray(measured, float)
    p = np.asarray(predicted, float)
    codes = pd.factorize(np.asarray(clusters), sort=True)[0]
    # With a rival, 1 - a/s - (1 - b/s) = 0 - (a - b)/s.
    excess = (m - p) ** 2
    if rival is not None:
        excess -= (m - np.asarray(rival, float)) ** 2
    columns = (np.ones_like(m), m, m**2, excess)
    sums = np.stack([np.bincount(codes, column) for column in columns], 1)  # [C,4]

    def statistic(_values: Array, weights: Array) -> Array:
        count, total, square, residual = (weights @ sums).T
        return float(rival is None) - residual / (square - total**2 / count)

    clusters = np.arange(len(sums))  # the statistic takes its values from `sums`
    return estimate(clusters, clusters, statistic=statistic, seed=seed)._replace(n=len(m))


def cross_fitted(measured: Array, features: Array, clusters: ArrayLike, groups: ArrayLike | None = None) -> Array:
    """Least squares on predictions [n,P] without a constant, never scored on the clusters that it was fitted on:
    clusters are dealt into two halves, and each half is predicted by coefficients of the other half, group by group
    where there are `groups`. One prediction gets one scale. Returns [n] predictions."""
    half = pd.factorize(np.asarray(clusters), sort=True)[0] % 2
    labels = np.zeros(len(measured)) if groups is None else np.asarray(groups)
    predicted = np.zeros_like(measured)
    for group, side in itertools.product(np.unique(labels), (0, 1)):
        fitted = (labels == group) & (half == 1 - side)
        scored = (labels == group) & (half == side)
        coefficients, *_ = np.linalg.lstsq(features[fitted], measured[fitted], rcond=None)
        predicted[scored] = features[scored] @ coefficients
    return predicted


def with_control(cells: pd.DataFrame, of: str, seed: int) -> pd.DataFrame:
    """Add the column `shuffled`: prediction `of` for another firing at the same horizon, rank group and eps."""
    firings = np.random.default_rng(seed).permutation(np.unique(cells["firing"]))
    partner = dict(zip(firings, np.roll(firings, 1)))
    keys = ["horizon", "rank", "eps", "partner"]
    predictions = cells.rename(columns={"firing": "partner", of: CONTROL_COLUMN})[[*keys, CONTROL_COLUMN]]
    paired = cells.assign(partner=cells["firing"].map(partner))
    return paired.merge(predictions, on=keys).drop(columns="partner")


def scores_table(cells: pd.DataFrame, predictors: Sequence[str], seed: int = 0) -> pd.DataFrame:
    """Every predictor, over all rows and per horizon, rank group, eps, and horizon by eps.

    Groups in which every measured change is the same have no R^2 and are left out.
    """
    rows = []
    for split in _SPLITS:
        for levels, part in cells.groupby([*split, np.zeros(len(cells))]):
            if part["measured"].nunique() == 1:
                continue
            names = {}
            for axis, level in zip(split, levels):
                names[axis] = level if isinstance(level, str) else f"{level:g}"
            measured = part["measured"].to_numpy(float)
            sequence = part["sequence"].to_numpy()
            for predictor in predictors:
                predicted = part[predictor].to_numpy(float)
                unfitted = r2_estimate(measured, predicted, sequence, seed=seed)
                scaled = cross_fitted(measured, predicted[:, None], sequence)
                row = {
                    "predictor": predictor,
                    **names,
                    "r2": unfitted.mean,
                    "r2_low": unfitted.low,
                    "r2_high": unfitted.high,
                    "r2_global_scale": r2_score(measured, scaled),
                    "n": len(part),
                }
                rows.append(row)
    return pd.DataFrame(rows, columns=list(SCORES)).fillna({"horizon": "all", "rank": "all", "eps": "all"})


def cell_r2(cells: pd.DataFrame, predictor: str) -> pd.DataFrame:
    """R^2 over eps of every cell that changes with eps, with a scale fitted to it: r2 and sequence."""
    keys = [cells[name] for name in CELL]
    measured = cells["measured"]
    predicted = cells[predictor]
    square = (predicted**2).groupby(keys).transform("sum")
    product = (predicted * measured).groupby(keys).transform("sum")
    scale = product / square.where(square > 0, np.inf)  # 0 where nothing is predicted
    residual = ((measured - scale * predicted) ** 2).groupby(keys).sum()
    by_cell = measured.groupby(keys)
    total = by_cell.var(ddof=0) * by_cell.size()
    sequence = cells["sequence"].groupby(keys).first()
    table = pd.DataFrame({"r2": 1 - residual / total, "sequence": sequence})
    return table[total > 0]
