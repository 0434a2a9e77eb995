"""How well an atom fires where a token is, against NumPy's correlation of the two."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from writesae.experiment.firings import Firings
from writesae_study.dictionary.selectivity import alignment


def test_alignment_is_the_correlation_of_firing_and_token() -> None:
    """Of a token that is nowhere it is 0."""
    rng, some, tokens = np.random.default_rng(0), np.array([0, 2, 5]), [2, 4, 64]
    ids, fires = rng.integers(5, size=(6, 30)), rng.random((6, 30, 2)) < 0.2
    fires[..., 1] |= ids == 2
    places = fires.nonzero()
    firings = Firings(*places, np.ones(len(places[0]), np.float32), 6, 30, 2)
    fit = alignment(firings, torch.tensor(ids), some, tokens)
    for n, token in enumerate(tokens[:2]):
        here = (ids[some] == token).ravel()
        for m, active in enumerate(fires[some].reshape(-1, 2).T):
            assert fit.both[n, m] == (active & here).sum()
            assert fit.phi[n, m] == pytest.approx(np.corrcoef(active, here)[0, 1])
    assert fit.phi[0, 1] > 0.5 and not fit.phi[2].any()
