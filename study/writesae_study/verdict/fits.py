"""How well predictions meet measurements: R^2 without a fitted number, with one, and with one for each cell.

R^2 is 1 - sum (m - p)^2 / sum (m - mean m)^2: 0 is no better than one number for all rows, and it has no lower limit.

A table of *cells* has one row per firing, horizon, rank group and eps: the change that was `measured`, and one column
of predicted changes per formula.
"""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from writesae.dictionary.estimates import Array, Estimate
from writesae_study.verdict.statistics import estimate

CONTROL_COLUMN = "shuffled"
"""Name of the control: a formula's prediction for another firing."""
CELL = ["firing", "horizon", "rank"]
"""What the paper calls a cell: one prompt, feature and token. The sizes eps are its points."""


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
