"""Principal components of writes that do not vary in every direction."""

from __future__ import annotations

import torch

from sae_lens_writesae.atom.low_rank import LowRank
from writesae_study.head.components import fit_pca


def test_components_without_variance_are_left_out() -> None:
    pca = fit_pca(LowRank(torch.ones(5, 1, 3), torch.ones(5, 1, 4)), 2)
    assert pca.components.shape == (0, 12) and torch.equal(pca.project(torch.ones(2, 12), 2), torch.ones(2, 12))
    two = LowRank(torch.eye(3)[torch.arange(9) % 2][:, None], torch.ones(9, 1, 4))
    assert len(fit_pca(two, 4).components) == 1
