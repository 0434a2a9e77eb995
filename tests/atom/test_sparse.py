"""Low-rank rows: inner products and distances against the dense matrices, and gradients by finite differences."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from sae_lens_writesae.atom import sparse

N, F, K, V = 9, 12, 5, 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def operands(terms: int, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, values, v and w."""
    return draw(N, terms, K), draw(N, terms, V, seed=1), draw(F, rank, K, seed=2), draw(F, rank, V, seed=3)


def uneven(active: int = 3) -> Tensor:
    """A code whose rows have between 0 and `active` atoms, of both signs."""
    code = draw(N, F, seed=4)
    keep = code.abs().argsort(dim=1, descending=True).argsort(dim=1)
    return code * (keep < (torch.arange(N) % (active + 1))[:, None])


@pytest.mark.parametrize("terms, rank", [(1, 1), (2, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize("full_gradient", [True, False])
def test_rows_are_their_dense_matrices(terms: int, rank: int, full_gradient: bool) -> None:
    keys, values, v, w = operands(terms, rank)
    x, atoms, matrix = (keys.mT @ values).flatten(1), sparse.khatri_rao(v, w), draw(K, V)
    torch.testing.assert_close(sparse.encode_rows(keys, values, v, w), x @ atoms.T)
    torch.testing.assert_close(sparse.gram(v, w, v[:3], w[:3]), atoms @ atoms[:3].T)
    torch.testing.assert_close(sparse.matrix_products(matrix, v, w), atoms @ matrix.flatten())
    for code in (uneven(), draw(N, F), torch.zeros(N, F, dtype=torch.float64)):
        rest = x - matrix.flatten()
        expected = (rest - code @ atoms).square().sum(1) - rest.square().sum(1)
        found = sparse.row_distances(keys, values, matrix, code, v, w, full_gradient=full_gradient)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("terms, rank", [(1, 1), (2, 3)])
@pytest.mark.parametrize("every", [1, 9])
def test_encoding_has_the_gradient_of_finite_differences(terms: int, rank: int, every: int) -> None:
    """With few pairs that have a gradient (gathered) and with all of them (one product)."""
    inputs = [t.requires_grad_() for t in operands(terms, rank)]
    few = torch.arange(N * F).view(N, F) % every == 0
    assert gradcheck(lambda *t: sparse.encode_rows(*t)[few], inputs)
    keys, values, *factors = inputs
    rows = keys.detach(), values.detach()
    assert gradcheck(lambda *t: sparse.encode_rows(*rows, *t)[few], factors)


@pytest.mark.parametrize("terms, rank", [(1, 1), (2, 3)])
def test_distances_have_the_gradient_of_finite_differences(terms: int, rank: int) -> None:
    keys, values, v, w = operands(terms, rank)
    code, on = uneven(2), uneven(2) != 0
    factors = [v.requires_grad_(), w.requires_grad_(), draw(K, V).requires_grad_()]

    def gathered(active: Tensor, v: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        full = torch.zeros_like(code).masked_scatter(on, active)
        return sparse.row_distances(keys, values, bias, full, v, w, full_gradient=False)

    assert gradcheck(gathered, [code[on].requires_grad_(), *factors])

    def everything(code: Tensor, v: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return sparse.row_distances(keys, values, bias, code, v, w)

    assert gradcheck(everything, [code.clone().requires_grad_(), *factors])
