"""Principal components of writes whose rank is known, against dense matrices."""

from __future__ import annotations

import pytest
import torch

from sae_lens_writesae.atom.low_rank import LowRank
from writesae.experiment.pca import fit_pca


@pytest.mark.parametrize("n, rank", [(12, 1), (300, 2)])
def test_components_are_those_of_the_dense_writes(n: int, rank: int) -> None:
    drawn = torch.Generator().manual_seed(rank)
    writes = LowRank(
        torch.randn(n, rank, 6, generator=drawn, dtype=torch.float64),
        torch.randn(n, rank, 5, generator=drawn, dtype=torch.float64) + 0.5,
    )
    rows, pca = writes.dense().flatten(1), fit_pca(writes, 3)
    axes = torch.linalg.svd(rows - rows.mean(0)).Vh
    torch.testing.assert_close(pca.components @ pca.components.T, torch.eye(3).double())
    for r in (1, 3, 9):
        expected = rows.mean(0) + (rows - rows.mean(0)) @ axes[: min(r, 3)].T @ axes[: min(r, 3)]
        torch.testing.assert_close(pca.project(rows, r), expected)


def test_components_without_variance_are_left_out() -> None:
    equal = LowRank(torch.ones(5, 1, 3), torch.ones(5, 1, 4))
    pca = fit_pca(equal, 2)
    assert pca.components.shape == (0, 12) and torch.equal(pca.project(torch.ones(2, 12), 2), torch.ones(2, 12))
    two = LowRank(torch.eye(3)[torch.arange(9) % 2][:, None], torch.ones(9, 1, 4))
    assert len(fit_pca(two, 4).components) == 1
