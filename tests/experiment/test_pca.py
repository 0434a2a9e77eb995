"""Principal components of data whose rank is known."""

from __future__ import annotations

import pytest
import torch

from sae_lens_writesae.atom.low_rank import LowRank
from writesae.experiment.pca import fit_pca, fit_pca_of_writes


@pytest.mark.parametrize("shape", [(12, 30), (60, 30)])
def test_components_of_rank_r_data_are_exact_at_r(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    rows = torch.randn(shape[0], 4) @ torch.randn(4, shape[1]) + torch.randn(shape[1])
    pca = fit_pca(rows, 10)
    assert pca.components.shape == (4, shape[1])
    assert torch.allclose(pca.components @ pca.components.T, torch.eye(4), atol=1e-5)
    assert torch.allclose(pca.project(rows, 4), rows, atol=1e-4)
    errors = [float((pca.project(rows, r) - rows).square().sum()) for r in range(5)]
    sigma = torch.linalg.svdvals(rows.double() - rows.double().mean(0))
    expected = [float(sigma[r:].square().sum()) for r in range(4)]
    assert errors[:4] == pytest.approx(expected, rel=1e-4) and errors[4] < 1e-6 * errors[0]


def test_equal_rows_have_a_mean_and_no_component() -> None:
    rows = torch.ones(5, 6) * torch.arange(6.0)
    pca = fit_pca(rows, 3)
    assert pca.components.shape == (0, 6) and torch.equal(pca.project(rows, 3), rows)
    with pytest.raises(ValueError, match="two"):
        fit_pca(rows[:1], 1)


@pytest.mark.parametrize("rank", [1, 2])
def test_components_of_writes_from_their_factors_are_those_of_their_entries(rank: int) -> None:
    drawn = torch.Generator().manual_seed(rank)
    writes = LowRank(
        torch.randn(300, rank, 6, generator=drawn, dtype=torch.float64) * torch.tensor([4, 2, 1, 1, 1, 1.0]),
        torch.randn(300, rank, 5, generator=drawn, dtype=torch.float64) * torch.tensor([3, 1, 1, 1, 1.0]) + 0.5,
    )
    rows = writes.dense().flatten(1)
    plain, fast = fit_pca(rows, 3), fit_pca_of_writes(writes, 3, passes=60)
    torch.testing.assert_close(fast.mean, plain.mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fast.project(rows, 3), plain.project(rows, 3), rtol=1e-10, atol=1e-10)
    default = fit_pca_of_writes(writes, 3)
    lost = [float((pca.project(rows, 3) - rows).square().sum()) for pca in (default, plain)]
    assert lost[0] == pytest.approx(lost[1], rel=1e-4)


def test_equal_writes_have_a_mean_and_no_component() -> None:
    writes = LowRank(torch.ones(5, 1, 3), torch.ones(5, 1, 4))
    pca = fit_pca_of_writes(writes, 2)
    assert pca.components.shape == (0, 12) and torch.equal(pca.mean, torch.ones(12))
    with pytest.raises(ValueError, match="two"):
        fit_pca_of_writes(writes.rows([0]), 1)
