"""Baselines without training: planted worlds in which each must find the truth, and steps written out by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from saes import close, normal, random_low_rank, random_sae
from torch import Tensor

from hookpoints import HookedRecurrent
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.errors import NothingToMeasureError
from writesae_study.experiment.bench import Bench
from writesae_study.experiment.terms import tokens_and_before
from writesae_study.head.baselines import HeadBaselines
from writesae_study.head.components import fit_pca
from writesae_study.head.quantizer import lloyd

K, V, N = 5, 7, 240


def writes(n: int = N, rank: int = 1, seed: int = 0) -> LowRank:
    return random_low_rank(rank, seed, n, K, V)


def text(n: int = N, vocabulary: int = 12, seed: int = 0) -> np.ndarray:
    return tokens_and_before(torch.tensor(np.random.default_rng(seed).integers(0, vocabulary, n)))


def fitted(of: LowRank, tokens: np.ndarray) -> HeadBaselines:
    return HeadBaselines.fit(of, tokens, n_codes=20, rng=np.random.default_rng(0))


def shrunk_by_hand(of: LowRank, tokens: np.ndarray) -> dict[int, pd.DataFrame]:
    """Means of the token (1) and of the pair (2) at each position, from dense matrices."""
    dense = pd.DataFrame(of.dense().flatten(1).numpy())
    levels = [np.zeros(len(tokens)), tokens[:, 1], 1000 * tokens[:, 0] + tokens[:, 1]]
    shrunk, means = dense.groupby(levels[0]).transform("mean"), {}
    for depth, (outer, inner) in enumerate(itertools.pairwise(levels), 1):
        groups, above = dense.groupby(inner), dense.groupby(outer).transform("mean")
        n, n_inner, n_outer = len(dense), groups.ngroups, len(set(outer))
        raw, size = groups.transform("mean"), groups.transform("size").to_numpy()
        noise = ((dense - raw) ** 2).to_numpy().sum() / (n - n_inner)
        spread = n - (size / dense.groupby(outer).transform("size")).sum()
        between = ((raw - above) ** 2).to_numpy().sum()
        strength = noise * spread / (between - (n_inner - n_outer) * noise)
        weight = (size / (size + strength))[:, None]
        means[depth] = shrunk = weight * raw + (1 - weight) * shrunk
    return means


@pytest.mark.parametrize("rank", [1, 2])
def test_means_are_shrunk_as_by_hand(rank: int) -> None:
    tokens = text()
    by_token, by_pair = writes(12, rank, seed=3), writes(200, rank, seed=7)
    of = writes(rank=rank) * 0.7
    keys = of.keys + by_token.keys[tokens[:, 1]] + 0.5 * by_pair.keys[(12 * tokens[:, 0] + tokens[:, 1]) % 200]
    of = LowRank(keys, of.values + by_token.values[tokens[:, 1]])
    made = fitted(of, tokens)
    assert all(0 < strength < np.inf for strength in made.strengths)
    for depth, expected in shrunk_by_hand(of, tokens).items():
        for pair, mean in zip(tokens.tolist(), expected.to_numpy()):
            close(made.shrunk_mean(*pair, depth).flatten(), torch.tensor(mean))


def test_a_write_that_is_a_function_of_its_token_is_found_and_an_unseen_token_has_the_mean() -> None:
    tokens = text()
    of = writes(12).rows(torch.tensor(tokens[:, 1]))
    made = fitted(of, tokens)
    for name in ("token_mean", "pair_mean"):
        close(made.written(name, of, tokens).dense(), of.dense())
    close(made.shrunk_mean(3, 99, 1), of.dense().mean(0))
    close(made.shrunk_mean(99, 4, 2), made.shrunk_mean(0, 4, 1))  # an unseen pair has the mean of its token


def test_drawn_is_the_write_with_the_largest_cosine_at_least_squares() -> None:
    of, new = writes(), writes(9, seed=11)
    made = fitted(of, text())
    best = made.drawn.rows(made.drawn.cosines(new).abs().argmax(0))
    close(made.drawn.cosines(of).amax(1), torch.ones(20, dtype=torch.float64))
    close(made.written("drawn", new, text()[:9]).dense(), (best * (new.inner(best) / best.inner(best))).dense())


def test_the_quantizer_finds_planted_directions_and_never_gets_worse() -> None:
    truth = writes(6, seed=3)
    of = truth.rows(torch.arange(N) % 6) * normal(N, seed=5)  # gains of either sign
    noisy = LowRank(of.keys + 0.02 * normal(N, 1, K, seed=6), of.values)
    codes = lloyd(noisy, noisy.rows(torch.arange(6)))
    assert float(codes.cosines(truth).abs().amax(0).min()) > 0.99
    free, few = writes(seed=8), writes(10, seed=9)
    before, after = (free.cosines(each).square().amax(1).sum() for each in (few, lloyd(free, few)))
    assert after > before


def test_principal_components_and_the_mean_write_what_lies_in_their_span() -> None:
    axes = writes(3, seed=5)
    of = LowRank.cat([axes.rows([j]).expand(N) * normal(N, seed=7 + j) for j in range(3)])
    made = fitted(of, text())
    close(made.written("pca", of, text()).dense(), of.dense(), 0.1)  # cut to 99.9 % of the square
    assert not torch.allclose(made.written("pca", writes(4), text()[:4]).dense(), writes(4).dense(), atol=0.1)
    assert len(fit_pca(axes.rows([0, 1]).rows([0, 1] * 5), 4).components) == 1  # two writes vary in one direction


# -- on a model


def test_each_half_is_fitted_on_the_other(model64: HookedRecurrent, varied: Tensor) -> None:
    lab = Bench(model64, {"": random_sae(model64)}, varied, seed=5)
    for sequence in range(8):
        own = lab.native_writes([sequence])
        other = lab.baselines(sequence).writes
        assert len(other) == 96 and not (other.keys[:, None] == own.keys[None]).all(-1).any()
    assert len({id(lab.baselines(n)) for n in range(8)}) == 2  # fitted once for each half
    assert len(lab.baselines(0).drawn) == 12  # as many as the dictionary has atoms
    with pytest.raises(NothingToMeasureError, match="reference"):
        Bench(model64, {"": random_sae(model64)}, varied[:1]).baselines(0)
