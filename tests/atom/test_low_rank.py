"""Sums of outer products against the dense matrices they stand for, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saes import close
from saes import random_low_rank as draw

from sae_lens_writesae import LowRank

N, K, V = 6, 5, 7


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
def test_arithmetic_is_that_of_the_matrices(r: int, s: int, seed: int) -> None:
    a, b = draw(r, seed), draw(s, seed + 1)
    close(a.inner(b), (a.dense() * b.dense()).sum((1, 2)))
    close(a.norm(), a.dense().norm(dim=(1, 2)))
    close(a.cosine(b), torch.cosine_similarity(a.dense().flatten(1), b.dense().flatten(1)))
    pairs = torch.cosine_similarity(a.dense().flatten(1)[:, None], b.dense().flatten(1)[None], dim=-1)
    close(a.cosines(b), pairs)
    close(LowRank.cat([a, b]).dense(), a.dense() + b.dense())
    scale = torch.linspace(-1, 2, N, dtype=torch.float64)
    close((a * scale).dense(), scale[:, None, None] * a.dense())
    close((a * 3.0).dense(), 3 * a.dense())
    rescaled = a.with_norm(scale.abs() + 1)
    close(rescaled.norm(), scale.abs() + 1)
    close(rescaled.cosine(a), torch.ones(N, dtype=torch.float64))


def test_a_zero_matrix_has_cosine_zero_and_no_direction() -> None:
    a = draw(1, 0)
    zero = a * torch.tensor([1.0, 0, 1, 1, 1, 1])
    assert a.cosine(zero)[1] == 0 and not a.cosines(zero)[:, 1].any()
    with pytest.raises(ValueError, match="matrix 1"):
        zero.with_norm(torch.ones(N))


@pytest.mark.parametrize("balanced", [False, True])
def test_svd_is_exact_or_the_closest_of_its_rank(balanced: bool) -> None:
    matrices = torch.randn(N, K, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    close(LowRank.svd(matrices, balanced=balanced).dense(), matrices)
    closest, singular = LowRank.svd(matrices, 2, balanced=balanced), torch.linalg.svdvals(matrices)
    close((matrices - closest.dense()).norm(dim=(1, 2)), singular[:, 2:].norm(dim=1))
    sides = (singular[:, :2].sqrt(),) * 2 if balanced else (singular[:, :2], torch.ones(N, 2, dtype=torch.float64))
    close(closest.keys.norm(dim=-1), sides[0])
    close(closest.values.norm(dim=-1), sides[1])


def test_random_directions_are_seeded_and_isotropic() -> None:
    like = draw(2, 0, 4000)
    one, two = (like.random_like(torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one.keys, two.keys) and one.keys.dtype == torch.float64
    cosine = one.cosine(like)
    assert abs(cosine.mean()) < 0.02  # no preferred direction; the standard deviation is about 1 / sqrt(K V)
    assert cosine.std() == pytest.approx((K * V) ** -0.5, rel=0.2)


@pytest.mark.parametrize("keys, values", [((3, K), (3, V)), ((3, 2, K), (3, 1, V)), ((3, 1, K), (2, 1, V))])
def test_other_shapes_are_refused(keys: tuple[int, ...], values: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="keys"):
        LowRank(torch.ones(keys), torch.ones(values))
