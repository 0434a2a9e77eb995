"""Gaussian mixtures of one-dimensional samples, and how many components BIC prefers (scikit-learn)."""

from __future__ import annotations

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
}
"""Of the table of fits, which has one row for each component of each mixture."""


def fit_mixtures(values: ArrayLike, largest: int = 4, *, restarts: int = 3, seed: int = 0) -> pd.DataFrame:
    """Mixtures of 1..`largest` Gaussians, each the best of `restarts` starts; components in order of their means.

    A mixture of c components is fitted only where there are 5 c distinct values. Nothing is fitted to equal values,
    because a Gaussian without width has no likelihood. No entry of the table is NaN.

    Returns: columns as in `COLUMNS`.
    """
    x = np.asarray(values, dtype=float)[:, None]
    rows = []
    most = min(largest, len(np.unique(x)) // VALUES_PER_COMPONENT)
    # Relative to the variance, so that the answer does not depend on the unit.
    regularization = 1e-4 * float(x.var())
    for c in range(1, most + 1):
        fit = GaussianMixture(c, n_init=restarts, reg_covar=regularization, random_state=seed).fit(x)
        means = np.asarray(fit.means_)[:, 0]
        deviations = np.sqrt(np.asarray(fit.covariances_)[:, 0, 0])
        bic = fit.bic(x)
        parts = sorted(zip(means, np.asarray(fit.weights_), deviations))
        for n, (mean, weight, sd) in enumerate(parts, 1):
            rows.append((c, n, weight, mean, sd, bic))
    # Without rows the columns would hold objects, and so would those of tables that it is joined to.
    return pd.DataFrame(rows, columns=[*COLUMNS]).astype(float).astype({"components": int, "component": int})


def fisher_z(cosine: ArrayLike) -> NDArray[np.float64]:
    """Fisher's z, artanh of a cosine, which spreads values near 1 apart; cosines are clipped to ±(1 - 1e-6)."""
    return np.arctanh(np.clip(np.asarray(cosine, dtype=float), -LARGEST_COSINE, LARGEST_COSINE))
