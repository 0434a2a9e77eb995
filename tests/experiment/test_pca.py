"""Principal components of data whose rank is known."""

from __future__ import annotations

import pytest
import torch

from sae_lens_writesae.experiment.pca import fit_pca


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
