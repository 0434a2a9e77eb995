"""How well an atom fires where a token is, against NumPy's correlation of the two."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from writesae.experiment.firings import Firings
from writesae_study.dictionary.selectivity import alignment


def test_alignment_is_the_correlation_of_firing_and_token() -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(5, size=(6, 30))
    fires = rng.random((6, 30, 3)) < 0.2
    fires[..., 1] |= (ids == 2) & (rng.random((6, 30)) < 0.8)
    fires[..., 2] = False
    sequence, position, atom = fires.nonzero()
    firings = Firings(sequence, position, atom, np.ones(len(atom), np.float32), 6, 30, 3)
    some = np.array([0, 2, 5])
    found = alignment(firings, torch.tensor(ids), some, [2, 4, 64])
    for n, token in enumerate((2, 4)):
        here = (ids[some] == token).ravel()
        for m in (0, 1):
            active = fires[some][..., m].ravel()
            assert found.both[n, m] == (active & here).sum()
            assert found.phi[n, m] == pytest.approx(np.corrcoef(active, here)[0, 1])
    assert found.phi[0, 1] > 0.5
    nothing = alignment(firings, torch.tensor(ids), some, [])
    assert nothing.both.shape == nothing.phi.shape == (0, 3)
    assert not found.phi[2].any() and not found.phi[:, 2].any()  # of a token that is nowhere, an atom that never fires
