"""Gaussian mixtures of one-dimensional samples, and how many components BIC prefers (scikit-learn)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from sklearn.mixture import GaussianMixture

#: Distinct values a mixture needs per component.
VALUES_PER_COMPONENT = 5

#: |cosine| is held below this before Fisher's z, which is infinite at 1.
LARGEST_COSINE = 1 - 1e-6


class MixtureFits(NamedTuple):
    """Fits of 1..m components to one sample."""

    table: pd.DataFrame
    """components, component, weight, mean, sd, bic (the lower the better), best (of all components). A row per
    component of each mixture."""
    omitted: str
    """Why larger mixtures, or all of them, were not fitted; empty if all were."""

    @property
    def preferred(self) -> int | None:
        """Components of the mixture with the lowest BIC; None where nothing was fitted."""
        best: Any = self.table[self.table["best"]]
        return None if best.empty else int(best["components"].iloc[0])


COLUMNS = ("components", "component", "weight", "mean", "sd", "bic", "best")


def fit_mixtures(values: ArrayLike, largest: int = 4, *, restarts: int = 3, seed: int = 0) -> MixtureFits:
    """Mixtures of 1..`largest` Gaussians, each the best of `restarts` starts; components in order of their means.

    A mixture of c components is fitted only where there are 5 c distinct values; of equal values none is, since a
    Gaussian without width has no likelihood. Nothing is NaN.
    """
    x = np.asarray(values, dtype=float)
    if x.ndim != 1 or not np.isfinite(x).all():
        raise ValueError(f"a mixture needs a 1-D array of finite values, found shape {x.shape}")
    distinct = len(np.unique(x))
    possible = [c for c in range(1, largest + 1) if distinct >= VALUES_PER_COMPONENT * c]
    rows = []
    for c in possible:
        # relative to the spread, so that the answer does not depend on the unit
        fit: Any = GaussianMixture(c, n_init=restarts, reg_covar=1e-4 * x.var(), random_state=seed).fit(x[:, None])
        bic, means = float(fit.bic(x[:, None])), fit.means_[:, 0]
        deviations = np.sqrt(np.asarray(fit.covariances_)[:, 0, 0])
        for rank, i in enumerate(np.argsort(means)):
            rows.append((c, rank + 1, float(fit.weights_[i]), float(means[i]), float(deviations[i]), bic))
    table = pd.DataFrame(rows, columns=list(COLUMNS[:-1]))
    table["best"] = table["bic"] == table["bic"].min() if len(table) else np.array([], dtype=bool)
    why = ""
    if len(possible) < largest:
        why = f"{distinct} distinct values, and a mixture of c components needs {VALUES_PER_COMPONENT} c"
    return MixtureFits(table, why)


def fisher_z(cosine: ArrayLike) -> np.ndarray:
    """Fisher's z, artanh of a cosine, which spreads values near 1 apart; cosines are held within ±(1 - 1e-6)."""
    return np.arctanh(np.clip(np.asarray(cosine, dtype=float), -LARGEST_COSINE, LARGEST_COSINE))
