"""How well predictions meet measurements: R^2 without a fitted number, with one, and with one for each group.

R^2 is 1 - sum (m - p)^2 / sum (m - mean m)^2: 0 is no better than one number for all rows, and it has no lower limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from sae_lens_writesae.verdict.statistics import Array, Estimate, estimate


class Fit(NamedTuple):
    """One scale for all rows, never scored on the clusters that it was fitted on."""

    scale: float
    """Least squares over all rows."""
    predicted: Array
    """The prediction of each row times the scale of the other half of the clusters."""


def r2(measured: Array, predicted: Array) -> float:
    """R^2 of the predictions as they are. Measured values that are all equal have none; the caller leaves them out."""
    return float(1 - ((measured - predicted) ** 2).sum() / ((measured - measured.mean()) ** 2).sum())


def r2_estimate(
    measured: ArrayLike, predicted: ArrayLike, clusters: ArrayLike, *, rival: ArrayLike | None = None, seed: int = 0
) -> Estimate:
    """R^2 with its interval over clusters; with a `rival` prediction, the paired difference of the two R^2.

    R^2 is made of sums over rows, so each cluster enters the bootstrap by its own sums. Cost: n_resamples * clusters.
    """
    m, p = np.asarray(measured, float), np.asarray(predicted, float)
    codes = pd.factorize(np.asarray(clusters), sort=True)[0]
    excess = (m - p) ** 2
    if rival is not None:  # 1 - a/s - (1 - b/s) = 0 - (a - b)/s
        excess = excess - (m - np.asarray(rival, float)) ** 2
    sums = np.stack([np.bincount(codes, column) for column in (np.ones_like(m), m, m**2, excess)], 1)  # [C,4]
    offset = 1.0 if rival is None else 0.0

    def statistic(_values: Array, weights: Array) -> Array:
        count, total, square, residual = (weights @ sums).T
        return offset - residual / (square - total**2 / count)

    each = np.arange(len(sums))
    return estimate(each, each, statistic=statistic, seed=seed)._replace(n=len(m))


def one_scale(measured: Array, predicted: Array, clusters: ArrayLike) -> Fit:
    """A least-squares scale, cross-fitted: clusters are dealt into two halves, and each half is scaled by what fits the
    other one."""
    half = pd.factorize(np.asarray(clusters), sort=True)[0] % 2
    scales = np.array([_scale(measured[half == side], predicted[half == side]) for side in (0, 1)])
    return Fit(_scale(measured, predicted), scales[1 - half] * predicted)


def scale_each(table: pd.DataFrame, predictor: str, groups: Sequence[str]) -> pd.Series:
    """Each prediction times the least-squares scale of its group, fitted on the rows that it is scored on.

    A group whose predictions are all 0 keeps 0.
    """
    keys = [table[name] for name in groups]
    above = (table[predictor] * table["measured"]).groupby(keys).transform("sum")
    below = (table[predictor] ** 2).groupby(keys).transform("sum")
    return table[predictor] * (above / below.where(below > 0, np.inf))


def _scale(measured: Array, predicted: Array) -> float:
    square = float(predicted @ predicted)
    return float(measured @ predicted) / square if square > 0 else 0.0
