"""How far an atom's firings are at one token: the paper reports selectivity, and calls it uninformative itself."""

from __future__ import annotations

import numpy as np
import pandas as pd
from torch import Tensor

from sae_lens_writesae.experiment.firings import Firings, Integers

_COLUMNS = ("atom", "firings", "token", "share", "chance")


def selectivity(firings: Firings, tokens: Tensor, min_firings: int, rng: np.random.Generator) -> pd.DataFrame:
    """For each atom with at least `min_firings` firings on tokens [N,T]: the most frequent token among its firings, its
    `share` of them, and `chance`, the same share for as many positions drawn at random. Cost: a pass over the firings.
    """
    ids = tokens.cpu().numpy().ravel()
    places = firings.sequence * firings.n_positions + firings.position
    order = np.argsort(firings.atom, kind="stable")
    atoms, starts = np.unique(firings.atom[order], return_index=True)
    rows = []
    for atom, of_atom in zip(atoms.tolist(), np.split(places[order], starts[1:])):
        if len(of_atom) >= min_firings:
            token, share = _most_frequent(ids[of_atom])
            _, chance = _most_frequent(ids[rng.choice(len(ids), len(of_atom), replace=False)])
            rows.append((atom, len(of_atom), token, share, chance))
    return pd.DataFrame(rows, columns=list(_COLUMNS))


def _most_frequent(ids: Integers) -> tuple[int, float]:
    values, counts = np.unique(ids, return_counts=True)
    best = int(counts.argmax())
    return int(values[best]), float(counts[best] / len(ids))
