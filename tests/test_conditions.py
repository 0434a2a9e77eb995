"""What each condition writes: norms, projections and directions, against dense matrices in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae_lens_writesae import conditions as C

N, K, V = 6, 5, 7


def factors(rank: int, seed: int, n: int = N) -> C.Factors:
    g = torch.Generator().manual_seed(seed)
    keys = torch.randn(n, rank, K, generator=g, dtype=torch.float64)
    return C.Factors(keys, torch.randn(n, rank, V, generator=g, dtype=torch.float64))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
def test_inner_norm_cosine_are_those_of_the_matrices(r: int, s: int, seed: int) -> None:
    a, b = factors(r, seed), factors(s, seed + 1)
    close(C.inner(a, b), (a.dense() * b.dense()).sum((1, 2)))
    close(C.norm(a), a.dense().norm(dim=(1, 2)))
    close(C.cosine(a, b), torch.cosine_similarity(a.dense().flatten(1), b.dense().flatten(1)))


def test_rank_one_cosine_is_the_product_of_factor_cosines() -> None:
    a, b = factors(1, 0), factors(1, 1)
    product = torch.cosine_similarity(a.keys, b.keys, -1) * torch.cosine_similarity(a.values, b.values, -1)
    close(C.cosine(a, b), product[:, 0])
    close(C.cosine(C.scaled(a, -torch.ones(N)), b), -product[:, 0])


def test_cosine_with_a_zero_matrix_is_zero() -> None:
    a = factors(1, 0)
    assert C.cosine(a, C.scaled(a, torch.zeros(N))).tolist() == [0] * N


@pytest.mark.parametrize("rank", [1, 3])
def test_scales(rank: int) -> None:
    native, atom, activation = factors(1, 0), factors(rank, 1), torch.arange(1.0, N + 1)
    own = C.atom_coefficient("coefficient", atom, native, activation)
    close(own, activation.double())
    matched = C.scaled(atom, C.atom_coefficient("matched", atom, native, activation))
    close(C.norm(matched), C.norm(native))
    assert (C.inner(matched, atom) > 0).all()
    fit = C.scaled(atom, C.atom_coefficient("least_squares", atom, native, activation))
    residual = native.dense() - fit.dense()
    close((residual * atom.dense()).sum((1, 2)), torch.zeros(N, dtype=torch.float64))  # orthogonal to the atom
    assert (residual.norm(dim=(1, 2)) < C.norm(native)).all()  # closer to the write than nothing
    close(C.norm(fit), C.norm(native) * C.cosine(native, atom).abs())


def test_matched_atom_beats_nothing_only_above_cosine_one_half() -> None:
    native, atom = factors(1, 0, 200), factors(1, 1, 200)
    matched = C.scaled(atom, C.atom_coefficient("matched", atom, native, torch.ones(200)))
    closer = (native.dense() - matched.dense()).norm(dim=(1, 2)) < C.norm(native)
    assert closer.any() and torch.equal(closer, C.cosine(native, atom) > 0.5)


def test_unknown_scale_and_control_are_named() -> None:
    a = factors(1, 0)
    with pytest.raises(ValueError, match="'frobenius'"):
        C.atom_coefficient("frobenius", a, a, torch.ones(N))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="psalm"):
        C.conditions(a, a, torch.ones(N), {"psalm": a})


def test_conditions_list_and_norms() -> None:
    native, atom = factors(1, 0), factors(2, 1)
    activation = torch.linspace(0.1, 3, N, dtype=torch.float64)
    mean = factors(4, 5, 1).expand(N)
    controls = dict(zip(C.CONTROLS, [factors(2, 2), factors(2, 3), factors(1, 4), factors(1, 6), mean]))
    made = C.conditions(native, atom, activation, controls)
    names = [(c.name, c.scale) for c in made]
    assert names[:2] == [("native", "none"), ("delete", "none")] and made[1].written is None
    assert names[2:] == [(name, scale) for scale in C.SCALES for name in ("atom", *C.CONTROLS)]
    assert made[0].written is native
    by_name = {(c.name, c.scale): c.written for c in made if c.written is not None}
    for scale in C.SCALES:
        atom_norm = C.norm(by_name["atom", scale])
        for name, direction in controls.items():
            close(C.norm(by_name[name, scale]), atom_norm)
            close(C.cosine(by_name[name, scale], direction), torch.ones(N, dtype=torch.float64))
    assert len({n for n in names}) == len(names) == 2 + 3 * 6


def test_every_condition_has_a_definition() -> None:
    assert set(C.DEFINITIONS) == {*C.UNSCALED, "atom", *C.CONTROLS, *C.REFERENCES}
    assert set(C.SCALE_DEFINITIONS) == {*C.SCALES, "none"}


def test_a_zero_control_has_no_direction() -> None:
    zero = C.scaled(factors(1, 0), torch.tensor([1.0, 0, 1, 1, 1, 1]))
    with pytest.raises(ValueError, match="matrix 1 is zero"):
        C.with_norm(zero, torch.ones(N))


def test_state_direction_is_the_best_rank_one_match() -> None:
    states = torch.randn(N, K, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    top = C.state_direction(states)
    close(C.norm(top), torch.ones(N, dtype=torch.float64))
    close((top.dense() * states).sum((1, 2)), torch.linalg.matrix_norm(states, 2))
    once = factors(1, 3)
    close(C.cosine(C.state_direction(once.dense()), once), torch.ones(N, dtype=torch.float64))


def test_mean_write() -> None:
    tokens = factors(1, 0, 30)
    keys, values = tokens.keys[:, 0], tokens.values[:, 0]
    whole = C.mean_write(keys, values)
    close(whole.dense()[0], tokens.dense().mean(0))
    assert whole.keys.shape == (1, min(K, V), K)
    part = C.mean_write(keys, values, energy=0.8)
    assert part.keys.shape[1] < min(K, V)
    missing = (whole.dense() - part.dense()).square().sum() / whole.dense().square().sum()
    assert missing <= 0.2
    assert C.mean_write(keys[:1], values[:1], energy=0.99).keys.shape[1] == 1
    with pytest.raises(ValueError, match="share"):
        C.mean_write(keys, values, energy=0)


def test_random_directions_are_seeded_and_isotropic() -> None:
    like = factors(2, 0, 4000)
    one = C.random_directions(like, torch.Generator().manual_seed(1))
    two = C.random_directions(like, torch.Generator().manual_seed(1))
    assert torch.equal(one.keys, two.keys) and one.keys.dtype == torch.float64
    cos = C.cosine(one, like)
    assert abs(cos.mean()) < 0.02  # no preferred direction; sd is about 1 / sqrt(K V)
    assert cos.std() == pytest.approx((K * V) ** -0.5, rel=0.2)


def test_factors_refuse_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"\[3, 5\]"):
        C.Factors(torch.ones(3, 5), torch.ones(3, 7))
    assert len(factors(1, 0).rows([0, 2])) == 2
