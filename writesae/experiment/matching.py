"""One-to-one matching of two dictionaries by the cosine of their atoms."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from sae_lens_writesae.atom.low_rank import LowRank


class Matching(NamedTuple):
    """min(F, G) pairs, in the order of the first dictionary."""

    first: NDArray[np.int64]
    """Index into the first dictionary."""
    second: NDArray[np.int64]
    """Its partner in the second."""
    cosine: NDArray[np.float64]
    """|cosine| of the two atoms as matrices; for rank 1 |cos(v, v')| |cos(w, w')|."""


def match_atoms(a: LowRank, b: LowRank) -> Matching:
    """The pairs whose |cosines| have the largest sum (linear assignment), so that no atom is used twice.

    A sign or a permutation of the atoms changes nothing. Cost F G R R' (K + V), and about min(F, G)^2 max(F, G) for the
    assignment (a second at F = G = 2,048).
    """
    if len(a) == 0 or len(b) == 0:
        raise ValueError(f"matching needs atoms on both sides, found {len(a)} and {len(b)}")
    size = a.cosines(b).abs().cpu().double().numpy()
    first, second = linear_sum_assignment(size, maximize=True)
    return Matching(first, second, size[first, second])
