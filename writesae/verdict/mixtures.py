"""Gaussian mixtures of one-dimensional samples, and how many components BIC prefers (scikit-learn)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from sklearn.mixture import GaussianMixture

VALUES_PER_COMPONENT = 5
"""Distinct values that a mixture needs for each component."""

LARGEST_COSINE = 1 - 1e-6
"""|cosine| is clipped to this before Fisher's z, which is infinite at 1."""

COLUMNS: dict[str, str] = {
    "components": "components of the mixture",
    "component": "number of the component, by its mean",
    "weight": "share of the component",
    "mean": "mean of the component",
    "sd": "standard deviation of the component",
    "bic": "BIC of the mixture; lower is better",
    "best": "whether this mixture has the lowest BIC of its sample and space",
}
"""Of the table of fits, which has one row for each component of each mixture."""


class MixtureFits(NamedTuple):
    """Fits of 1..m components to one sample."""

    table: pd.DataFrame
    """Columns as in `COLUMNS`; one sample and space."""
    skipped: str
    """Why larger mixtures, or all of them, were not fitted; empty if all were."""


def fit_mixtures(values: ArrayLike, largest: int = 4, *, restarts: int = 3, seed: int = 0) -> MixtureFits:
    """Mixtures of 1..`largest` Gaussians, each the best of `restarts` starts; components in order of their means.

    A mixture of c components is fitted only where there are 5 c distinct values. Nothing is fitted to equal values,
    because a Gaussian without width has no likelihood. No entry of the table is NaN.

    Raises:
        ValueError: the values are not a 1-D array of finite numbers.
    """
    x = np.asarray(values, dtype=float)
    if x.ndim != 1 or not np.isfinite(x).all():
        raise ValueError(f"a mixture needs a 1-D array of finite values, found shape {x.shape}")
    distinct = len(np.unique(x))
    fitted = [c for c in range(1, largest + 1) if distinct >= VALUES_PER_COMPONENT * c]
    rows = []
    for c in fitted:
        # The regularisation is relative to the variance, so that the answer does not depend on the unit.
        fit = GaussianMixture(c, n_init=restarts, reg_covar=1e-4 * float(x.var()), random_state=seed).fit(x[:, None])
        bic, weights, means = float(fit.bic(x[:, None])), np.asarray(fit.weights_), np.asarray(fit.means_)[:, 0]
        deviations = np.sqrt(np.asarray(fit.covariances_)[:, 0, 0])
        for rank, i in enumerate(np.argsort(means)):
            rows.append((c, rank + 1, float(weights[i]), float(means[i]), float(deviations[i]), bic))
    # Without rows the columns would hold objects, and so would those of tables that it is joined to.
    table = pd.DataFrame(rows, columns=[*COLUMNS][:-1]).astype(float).astype({"components": int, "component": int})
    table["best"] = table["bic"] == table["bic"].min()
    reason = ""
    if len(fitted) < largest:
        reason = f"{distinct} distinct values, and a mixture of c components needs {VALUES_PER_COMPONENT} c"
    return MixtureFits(table, reason)


def fisher_z(cosine: ArrayLike) -> NDArray[np.float64]:
    """Fisher's z, artanh of a cosine, which spreads values near 1 apart; cosines are clipped to ±(1 - 1e-6)."""
    return np.arctanh(np.clip(np.asarray(cosine, dtype=float), -LARGEST_COSINE, LARGEST_COSINE))


def preferred(fits: pd.DataFrame) -> tuple[int | None, float]:
    """Components of the mixture of one sample with the lowest BIC (None where none was fitted), and how much lower that
    is than the BIC of a single Gaussian."""
    if fits.empty:
        return None, 0.0
    best = fits.nsmallest(1, "bic").iloc[0]
    return int(best["components"]), float(fits.loc[fits["components"] == 1, "bic"].iloc[0] - best["bic"])
