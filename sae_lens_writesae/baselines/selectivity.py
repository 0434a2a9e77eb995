"""How far an atom's firings are at one token: the paper reports selectivity, and calls it uninformative itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from sae_lens_writesae.firings import Firings

COLUMNS = ("atom", "firings", "token", "share", "chance")


def selectivity(firings: Firings, tokens: Tensor, min_firings: int, seed: int = 0) -> pd.DataFrame:
    """For each atom with at least `min_firings` firings on tokens [N,T]: the most frequent token among its firings, its
    `share` of them, and `chance`, the same share for as many positions drawn at random. Cost: a pass over the firings.
    """
    ids = tokens.cpu().numpy().ravel()
    at = firings.sequence * firings.n_positions + firings.position
    order = np.argsort(firings.atom, kind="stable")
    atoms, starts = np.unique(firings.atom[order], return_index=True)
    rng = np.random.default_rng([seed, 8])
    rows: list[dict[str, Any]] = []
    for atom, own in zip(atoms, np.split(at[order], starts[1:])):
        if len(own) < min_firings:
            continue
        token, share = _most_frequent(ids[own])
        _, chance = _most_frequent(ids[rng.choice(len(ids), len(own), replace=False)])
        rows.append(dict(zip(COLUMNS, (int(atom), len(own), token, share, chance))))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _most_frequent(ids: NDArray[np.int64]) -> tuple[int, float]:
    values, counts = np.unique(ids, return_counts=True)
    best = int(counts.argmax())
    return int(values[best]), float(counts[best] / len(ids))
