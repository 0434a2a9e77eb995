"""How well predictions meet measurements: R^2 without a fitted number, with one, and with one for each cell.

R^2 is 1 - sum (m - p)^2 / sum (m - mean m)^2: 0 is no better than one number for all rows, and it has no lower limit.

A table of *cells* has one row per quantity, firing, horizon, rank group and eps: the change that was `measured`, and
one column of predicted changes per formula.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from writesae.verdict.statistics import Array, Estimate, estimate, weighted_median

CONTROL = "shuffled"
"""Name of the control: a formula's prediction for another firing."""
CELL = ["quantity", "firing", "horizon", "rank"]
"""What the paper calls a cell: one prompt, feature and token. The sizes eps are its points."""
ALL = "all"
"""Level of an axis that is not split."""
_SPLITS: tuple[tuple[str, ...], ...] = ((), ("horizon",), ("rank",), ("eps",), ("horizon", "eps"))

SCORES: dict[str, str] = {
    "quantity": "logit or log_prob",
    "predictor": "F0, F1, F2, or the control",
    "horizon": "one horizon, or all",
    "rank": "one rank group, or all",
    "eps": "one size, or all",
    "r2": "R^2 about the mean with nothing fitted; 0 is no better than one number for all rows",
    "r2_low": "lower end of its 95 % interval over sequences",
    "r2_high": "upper end of its 95 % interval over sequences",
    "r2_global_scale": "R^2 with one scale for all rows, each half of the sequences scaled by the other's",
    "global_scale": "that scale, fitted on all rows",
    "per_cell_scale": "R^2 with a scale for each cell, fitted on what it is scored on: near 1 by construction",
    "pearson": "correlation; 0 where the prediction is constant",
    "sign_rate": "share of rows whose sign is predicted",
    "n": "number of rows",
    "n_sequences": "number of sequences",
}
"""Columns of `scores_table`."""
PER_CELL: dict[str, str] = {
    "quantity": "logit or log_prob",
    "predictor": "F0, F1, F2, or the control",
    "median_r2": "the paper's statistic: median over cells of R^2 over eps, each with a scale of its own",
    "low": "lower end of its 95 % interval over sequences",
    "high": "upper end of its 95 % interval over sequences",
    "n": "number of cells (firing, horizon, rank group)",
}
"""Columns of `per_cell_table`."""


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


def linear_fit(measured: Array, features: Array, clusters: ArrayLike, groups: ArrayLike) -> Array:
    """Least squares on several predictions [n,P] at once, without a constant and group by group, cross-fitted as in
    `one_scale`: each half of the clusters is predicted by coefficients of the other half. Returns [n] predictions."""
    half = pd.factorize(np.asarray(clusters), sort=True)[0] % 2
    labels, predicted = pd.factorize(np.asarray(groups))[0], np.zeros_like(measured)
    for group in np.unique(labels):
        for side in (0, 1):
            fitted, scored = ((labels == group) & (half == which) for which in (1 - side, side))
            coefficients = np.linalg.lstsq(features[fitted], measured[fitted], rcond=None)[0]
            predicted[scored] = features[scored] @ coefficients
    return predicted


def scale_cells(cells: pd.DataFrame, predictor: str) -> pd.Series:
    """Each prediction times the least-squares scale of its cell, fitted on the rows that it is scored on.

    A cell whose predictions are all 0 keeps 0.
    """
    keys = [cells[name] for name in CELL]
    above = (cells[predictor] * cells["measured"]).groupby(keys).transform("sum")
    below = (cells[predictor] ** 2).groupby(keys).transform("sum")
    return cells[predictor] * (above / below.where(below > 0, np.inf))


def _scale(measured: Array, predicted: Array) -> float:
    square = float(predicted @ predicted)
    return float(measured @ predicted) / square if square > 0 else 0.0


def with_control(cells: pd.DataFrame, of: str, seed: int) -> pd.DataFrame:
    """Add the column `shuffled`: prediction `of` for another firing at the same horizon, rank group and eps."""
    firings = np.random.default_rng(seed).permutation(np.unique(cells["firing"]))
    partner = dict(zip(firings, np.roll(firings, 1)))
    keys = ["quantity", "horizon", "rank", "eps"]
    lent = cells[[*keys, "firing", of]].rename(columns={"firing": "partner", of: CONTROL})
    paired = cells.assign(partner=cells["firing"].map(partner)).merge(lent, on=[*keys, "partner"])
    return paired.drop(columns="partner")


def scores_table(cells: pd.DataFrame, predictors: Sequence[str], seed: int = 0) -> pd.DataFrame:
    """Every predictor, over all rows and per horizon, rank group, eps, and horizon by eps.

    Groups in which every measured change is the same have no R^2 and are left out.
    """
    scaled = {predictor: scale_cells(cells, predictor) for predictor in predictors}
    rows = []
    for part, names in groups_of(cells):
        if not varies(part):
            continue
        measured, sequence = part["measured"].to_numpy(float), part["sequence"].to_numpy()
        for predictor in predictors:
            predicted, per_cell = part[predictor].to_numpy(float), scaled[predictor][part.index].to_numpy(float)
            fit, unfitted = (
                one_scale(measured, predicted, sequence),
                r2_estimate(measured, predicted, sequence, seed=seed),
            )
            numbers = {
                "r2": r2(measured, predicted),
                "r2_low": unfitted.low,
                "r2_high": unfitted.high,
                "r2_global_scale": r2(measured, fit.predicted),
                "global_scale": fit.scale,
                "per_cell_scale": r2(measured, per_cell),
                "pearson": float(np.corrcoef(measured, predicted)[0, 1]) if np.ptp(predicted) > 0 else 0.0,
                "sign_rate": float((np.sign(measured) == np.sign(predicted)).mean()),
                "n": len(measured),
                "n_sequences": unfitted.n_clusters,
            }
            rows.append(names | {"predictor": predictor} | numbers)
    return pd.DataFrame(rows, columns=list(SCORES))


def per_cell_table(cells: pd.DataFrame, predictors: Sequence[str], seed: int = 0) -> pd.DataFrame:
    """The paper's statistic, the median over cells of R^2 over eps with a scale fitted to each cell.

    All predictors here are proportional to eps, so that the scale leaves nothing of them: whatever they predict, the
    fit is the best line through 0, and R^2 says how straight the measured curve is.
    """
    rows = []
    for predictor, quantity in itertools.product(predictors, sorted(cells["quantity"].unique())):
        each = cell_r2(cells, predictor, quantity)
        if each.empty:
            continue
        median = estimate(each["r2"], each["sequence"], statistic=weighted_median, seed=seed)
        ends = {"low": median.low, "high": median.high}
        rows.append({"quantity": quantity, "predictor": predictor, "median_r2": median.mean, **ends, "n": median.n})
    return pd.DataFrame(rows, columns=list(PER_CELL))


def cell_r2(cells: pd.DataFrame, predictor: str, quantity: str = "logit") -> pd.DataFrame:
    """R^2 over eps of every cell of a quantity that changes with eps, with a scale fitted to it: r2 and sequence."""
    rows = cells[cells["quantity"] == quantity]
    groups = [rows[name] for name in CELL]
    measured = rows["measured"].groupby(groups)
    residual = ((rows["measured"] - scale_cells(rows, predictor)) ** 2).groupby(groups).sum()
    total = measured.var(ddof=0) * measured.size()
    table = pd.DataFrame({"r2": 1 - residual / total, "sequence": rows["sequence"].groupby(groups).first()})
    return table[total > 0]


def groups_of(cells: pd.DataFrame) -> Iterator[tuple[pd.DataFrame, dict[str, str]]]:
    """All rows of a quantity, then splits of them; an axis that is not split is called `ALL`."""
    for split, (quantity, whole) in itertools.product(_SPLITS, list(cells.groupby("quantity"))):
        names = {"quantity": str(quantity), "horizon": ALL, "rank": ALL, "eps": ALL}
        if not split:
            yield whole, names
            continue
        for level, part in whole.groupby(list(split)):
            levels = level if isinstance(level, tuple) else (level,)
            yield part, names | {axis: x if isinstance(x, str) else f"{x:g}" for axis, x in zip(split, levels)}


def varies(rows: pd.DataFrame) -> bool:
    """Whether any measured change differs from another."""
    return bool(np.ptp(rows["measured"].to_numpy(float)) > 0)


def score(scores: pd.DataFrame, predictor: str, **levels: float | str) -> pd.Series:
    """One row of the table `scores`; the levels quantity, horizon, rank and eps are "logit" and "all" where not named.

    Raises:
        KeyError: there is no such row; names what there is.
    """
    wanted = {"quantity": "logit", "predictor": predictor, "horizon": ALL, "rank": ALL, "eps": ALL}
    wanted |= {name: level if isinstance(level, str) else f"{level:g}" for name, level in levels.items()}
    rows = scores[np.logical_and.reduce([scores[name] == value for name, value in wanted.items()])]
    if rows.empty:
        known = {name: sorted(scores[name].unique()) for name in wanted}
        raise KeyError(f"no score for {wanted}; there are {known}")
    return rows.iloc[0]


def error_order(cells: pd.DataFrame) -> float:
    """Exponent by which F2's rms error on logits grows between the two smallest eps; 2 says that the rest is curvature.
    0 where there is no error."""
    logits = cells[cells["quantity"] == "logit"]
    square = (logits["measured"] - logits["F2"]) ** 2
    errors = (square.groupby(logits["eps"]).mean() ** 0.5).sort_index().iloc[:2]
    if errors.min() == 0:
        return 0.0
    x, y = np.log(errors.index.to_numpy(float)), np.log(errors.to_numpy(float))
    return float((y[1] - y[0]) / (x[1] - x[0]))


def slopes_of(doses: pd.DataFrame) -> pd.DataFrame:
    """Slope of `effect` and of `wrong` over the dose, by least squares through the origin, for each edited place."""
    by = ["atom", "sequence", "position"]
    products = doses[by].assign(
        effect=doses["effect"] * doses["dose"], wrong=doses["wrong"] * doses["dose"], square=doses["dose"] ** 2
    )
    sums = products.groupby(by).sum()
    return sums[["effect", "wrong"]].div(sums["square"], axis=0).reset_index()
