"""How well an atom fires where a token is, against NumPy's correlation of the two."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from made_firings import ATOMS, N, T, collected, drawn_activations

from writesae_study.dictionary.selectivity import alignment


def test_alignment_is_the_correlation_of_firing_and_token() -> None:
    """Of a token that is nowhere it is 0."""
    some, tokens, dense = np.array([0, 2, 5]), [2, 4, 64], drawn_activations()
    ids = np.random.default_rng(0).integers(5, size=(N, T))
    dense[..., 1] += torch.tensor(ids == 2)
    fit = alignment(collected(dense), torch.tensor(ids), some, tokens)
    for n, token in enumerate(tokens[:2]):
        here = (ids[some] == token).ravel()
        for atom in range(ATOMS - 1):
            active = (dense[some][..., atom] > 0).numpy().ravel()
            assert fit.both[n, atom] == (active & here).sum()
            assert fit.phi[n, atom] == pytest.approx(np.corrcoef(active, here)[0, 1])
    assert fit.phi[0, 1] > 0.5 and not fit.phi[2].any()
