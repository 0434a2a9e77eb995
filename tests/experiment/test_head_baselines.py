"""Baselines without training: planted worlds in which each must find the truth, and steps written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted import random_sae
from torch import Tensor

from hookpoints import HookedRecurrent
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.errors import NothingToMeasureError
from writesae.experiment.head_baselines import BASELINES, HeadBaselines, quantiser, tokens_and_before
from writesae.experiment.lab import Lab

K, V, N = 5, 7, 240


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def writes(n: int = N, rank: int = 1, seed: int = 0) -> LowRank:
    return LowRank(gaussian(n, rank, K, seed=seed), gaussian(n, rank, V, seed=seed + 1))


def text(n: int = N, vocabulary: int = 12, seed: int = 0) -> np.ndarray:
    ids = np.random.default_rng(seed).integers(0, vocabulary, n)
    return tokens_and_before(torch.tensor(ids))


def fitted(of: LowRank, tokens: np.ndarray, n_codes: int = 20, components: int = 4, seed: int = 0) -> HeadBaselines:
    rng = np.random.default_rng(seed)
    return HeadBaselines.fit(of, tokens, n_codes=n_codes, components=components, rng=rng)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def shrunk_by_hand(of: LowRank, tokens: np.ndarray) -> tuple[dict[int, Tensor], dict[tuple[int, int], Tensor]]:
    """Means of tokens and pairs, step by step on dense matrices."""
    dense = of.dense()
    mean = dense.mean(0)

    def strength(outer: list, inner: list) -> float:
        n, groups = len(dense), sorted(set(inner))
        means = {g: dense[[i for i, x in enumerate(inner) if x == g]].mean(0) for g in groups}
        above = {g: dense[[i for i, x in enumerate(outer) if x == g]].mean(0) for g in set(outer)}
        parent = dict(zip(inner, outer))
        within = sum(float((dense[i] - means[x]).square().sum()) for i, x in enumerate(inner))
        noise = within / (n - len(groups))
        between = sum(inner.count(g) * float((means[g] - above[parent[g]]).square().sum()) for g in groups)
        spread = n - sum(inner.count(g) ** 2 / outer.count(parent[g]) for g in groups)
        varied = (between - (len(groups) - len(set(outer))) * noise) / spread
        return noise / varied if varied > 0 else np.inf

    ids, pairs = tokens[:, 1].tolist(), [tuple(pair) for pair in tokens.tolist()]
    m, m_pair = strength([0] * len(ids), ids), strength(ids, pairs)
    of_token, of_pair = {}, {}
    for token in set(ids):
        rows = [i for i, x in enumerate(ids) if x == token]
        weight = len(rows) / (len(rows) + m)
        of_token[token] = weight * dense[rows].mean(0) + (1 - weight) * mean
    for pair in set(pairs):
        rows = [i for i, x in enumerate(pairs) if x == pair]
        weight = len(rows) / (len(rows) + m_pair)
        of_pair[pair] = weight * dense[rows].mean(0) + (1 - weight) * of_token[pair[1]]
    return of_token, of_pair


@pytest.mark.parametrize("rank", [1, 2])
def test_means_are_shrunk_as_by_hand(rank: int) -> None:
    tokens = text()
    by_token, by_pair = writes(12, rank, seed=3), writes(200, rank, seed=7)
    of = writes(rank=rank) * 0.7
    keys = of.keys + by_token.keys[tokens[:, 1]] + 0.5 * by_pair.keys[(12 * tokens[:, 0] + tokens[:, 1]) % 200]
    of = LowRank(keys, of.values + by_token.values[tokens[:, 1]])
    made = fitted(of, tokens)
    of_token, of_pair = shrunk_by_hand(of, tokens)
    assert 0 < made.tokens.strength < np.inf and 0 < made.pairs.strength < np.inf
    for pair, expected in of_pair.items():
        close(made.token_mean(pair), of_token[pair[1]])
        close(made.pair_mean(pair), expected)
    close(made.mean, of.dense().mean(0))


def test_a_write_that_is_a_function_of_its_token_is_found_and_an_unseen_token_has_the_mean() -> None:
    tokens = text()
    of = writes(12).rows(torch.tensor(tokens[:, 1]))
    made = fitted(of, tokens)
    close(made.written("token_mean", of, tokens).dense(), of.dense())
    close(made.written("pair_mean", of, tokens).dense(), of.dense())
    unseen = np.array([[3, 99]])
    close(made.written("token_mean", of.rows([0]), unseen).dense()[0], made.mean, 1e-2)  # cut to 99.9 % of its square
    close(made.token_mean((3, 99)), made.mean)
    close(made.pair_mean((99, 4)), made.token_mean((0, 4)))  # an unseen pair has the mean of its token


def test_tokens_that_say_nothing_are_shrunk_to_the_mean() -> None:
    """Writes drawn without regard to tokens: what means of tokens differ by is chance."""
    tokens, of = text(2000), writes(2000)
    made = fitted(of, tokens)
    raw = torch.stack([of.rows(np.flatnonzero(tokens[:, 1] == t).tolist()).dense().mean(0) for t in range(12)])
    kept = torch.stack([made.token_mean((0, t)) for t in range(12)])
    assert (kept - made.mean).square().sum() < 0.25 * (raw - made.mean).square().sum()


def test_drawn_is_the_write_with_the_largest_cosine_at_least_squares() -> None:
    of, new = writes(), writes(9, seed=11)
    made = fitted(of, text())
    assert len(made.drawn) == 20 and float(made.drawn.cosines(of).max(1).values.min()) == pytest.approx(1)
    cosines = made.drawn.dense().flatten(1) @ new.dense().flatten(1).T
    cosines = cosines / made.drawn.norm()[:, None] / new.norm()
    best = cosines.abs().argmax(0)
    written = made.written("drawn", new, text()[:9])
    close(written.cosine(made.drawn.rows(best)).abs(), torch.ones(9, dtype=torch.float64))
    residual = new.dense() - written.dense()
    close((residual * written.dense()).sum((1, 2)), torch.zeros(9, dtype=torch.float64))


def test_the_quantiser_finds_planted_directions_and_never_gets_worse() -> None:
    truth = writes(6, seed=3)
    which = torch.arange(N) % 6
    of = truth.rows(which) * gaussian(N, seed=5)  # gains of either sign
    noisy = LowRank(of.keys + 0.02 * gaussian(N, 1, K, seed=6), of.values)
    start = noisy.rows(torch.arange(6))
    codes = quantiser(noisy, start)
    assert float(codes.cosines(truth).abs().max(0).values.min()) > 0.99
    close(codes.norm(), torch.ones(6, dtype=torch.float64))
    free, few = writes(seed=8), writes(10, seed=9)

    def objective(dictionary: LowRank) -> float:
        return float(free.cosines(dictionary).square().max(1).values.sum())

    assert objective(quantiser(free, few)) > objective(few)


@pytest.mark.parametrize("rank", [1, 2])
def test_principal_components_and_the_mean_write_what_lies_in_their_span(rank: int) -> None:
    centre, axes = writes(1, rank, seed=3), writes(3, rank, seed=5)
    scores = gaussian(N, 3, seed=7)
    parts = [axes.rows([j]).expand(N) * scores[:, j] for j in range(3)]
    of = LowRank.cat([centre.expand(N), *parts])
    made = fitted(of, text(), components=3)
    close(made.written("pca", of, text()).dense(), of.dense(), 0.1)  # cut to 99.9 % of the square
    projected = made.components.project(of.dense().flatten(1), 3)
    close(projected, of.dense().flatten(1), 1e-9)
    assert not torch.allclose(made.written("pca", writes(4), text()[:4]).dense(), writes(4).dense(), atol=0.1)


def test_nothing_to_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="0 not 0"):
        fitted(writes() * 0.0, text())


# -- on a model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(1, 64, (4, 24), generator=torch.Generator().manual_seed(4))


def test_each_half_is_fitted_on_the_other(model64: HookedRecurrent, tokens: Tensor) -> None:
    lab = Lab(model64, {"": random_sae(model64)}, tokens, seed=5)
    for sequence in range(4):
        own = lab.native_writes([sequence])
        other = lab.baselines(sequence).writes
        assert len(other) == 48 and not (other.keys[:, None] == own.keys[None]).all(-1).any()
    assert len({id(lab.baselines(n)) for n in range(4)}) == 2  # fitted once for each half
    assert len(lab.baselines(0).drawn) == 12  # as many as the dictionary has atoms
    assert len(lab.baselines(0, n_codes=5).codes) == 5
    again = Lab(model64, {"": random_sae(model64)}, tokens, seed=5).baselines(0)
    assert torch.equal(again.codes.keys, lab.baselines(0).codes.keys)


def test_other_text_takes_the_place_of_the_halves(model64: HookedRecurrent, tokens: Tensor) -> None:
    reference = torch.randint(1, 64, (3, 30), generator=torch.Generator().manual_seed(9))
    lab = Lab(model64, {"": random_sae(model64)}, tokens[:1], reference=reference)
    assert len(lab.baselines(0).writes) == 90
    native = lab.native_writes([0])
    for name in BASELINES:
        assert len(lab.baselines(0).written(name, native, tokens_and_before(tokens[0]))) == 24
    with pytest.raises(ValueError, match="1 of its 3"):
        Lab(model64, {"": random_sae(model64)}, reference[1:2], reference=reference)


def test_one_sequence_without_other_text_has_no_baseline(model64: HookedRecurrent, tokens: Tensor) -> None:
    with pytest.raises(NothingToMeasureError, match="reference"):
        Lab(model64, {"": random_sae(model64)}, tokens[:1]).baselines(0)
