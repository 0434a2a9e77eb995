"""How well an atom fires where a token is, against NumPy's correlation of the two."""

from __future__ import annotations

import numpy as np
import torch

from writesae.experiment.firings import Firings
from writesae_study.dictionary.selectivity import alignment


def test_alignment_is_the_correlation_of_firing_and_token() -> None:
    """Of a token that is nowhere (64) and an atom that never fires (2) it is 0."""
    rng = np.random.default_rng(0)
    ids = rng.integers(5, size=(6, 30))
    fires = rng.random((6, 30, 3)) < 0.2
    fires[..., 1] |= (ids == 2) & (rng.random((6, 30)) < 0.8)
    fires[..., 2] = False
    sequence, position, atom = fires.nonzero()
    firings = Firings(sequence, position, atom, np.ones(len(atom), np.float32), 6, 30, 3)
    some, tokens = np.array([0, 2, 5]), [2, 4, 64]
    fit = alignment(firings, torch.tensor(ids), some, tokens)
    here, active = ids[some][..., None] == tokens, fires[some]
    both = np.einsum("stn,stf->nf", here.astype(int), active.astype(int))
    with np.errstate(invalid="ignore"):
        phi = np.corrcoef(here.reshape(-1, 3).T, active.reshape(-1, 3).T)[:3, 3:]
    np.testing.assert_array_equal(fit.both, both)
    np.testing.assert_allclose(fit.phi, np.nan_to_num(phi), atol=1e-12)
    assert fit.phi[0, 1] > 0.5 and alignment(firings, torch.tensor(ids), some, []).phi.shape == (0, 3)
