"""What can be written in the place of a head's write without any training: fitted on text that nothing is tested on.

A trained atom must be compared with these, because each of them takes a part of a deletion's effect back: means of what
the head writes (at any token, at the token, at the token pair), native writes drawn as a dictionary, a vector
quantiser, and principal components. Each has a size of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sae_lens_writesae.atom.low_rank import LowRank
from writesae.experiment.firings import Integers
from writesae.experiment.pca import MatrixPca, fit_pca

Baseline = Literal["head_mean", "token_mean", "pair_mean", "drawn", "quantised", "pca"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)
"""Names of the baselines, as conditions of an experiment."""

MAX_TOKENS = 32_768
"""Tokens that baselines are fitted on at most, whole sequences in their order."""

_LLOYD_PASSES = 10
_ENERGY = 0.999
"""A mean or a projection is written as the fewest rank-1 terms that hold this share of its squared norm."""
_BLOCK = 16_000_000
"""Inner products held at once: 64 MB in float32."""


@dataclass(frozen=True, eq=False)
class HeadBaselines:
    """Baselines of one head, from the N writes of a text.

    **Means.** With n_v occurrences of token v, W_v their mean write and W the mean of all: the mean write of the token
    is T_v = w W_v + (1 - w) W with w = n_v / (n_v + m); that of the pair (u, v) is w W_uv + (1 - w) T_v with
    w = n_uv / (n_uv + m'). This is James and Stein's shrinkage with m = (variance within) / (variance between), both by
    the moments of a one-way (nested) analysis of variance. A token without any occurrence has the head's mean.

    **Drawn.** n native writes D_j drawn at random, as a dictionary: the one with the largest |cosine|, at its
    least-squares coefficient <W, D_j> / |D_j|^2.

    **Quantised.** The same with n codes of rank 1 and unit norm from Lloyd's algorithm on the directions of the writes
    (gain-shape: the code with the largest |<W, C_j>|, times <W, C_j>), started from drawn writes.

    **PCA.** The mean and the projection of W - mean on the first components.
    """

    writes: LowRank
    """The N writes that all is fitted on."""
    mean: Tensor
    """[K,V]"""
    tokens: dict[int, Integers]
    """Positions of each token among the N writes."""
    pairs: dict[tuple[int, int], Integers]
    """The same of each token and the one before it."""
    strengths: tuple[float, float]
    """m of tokens and m' of pairs."""
    drawn: LowRank
    """n native writes."""
    codes: LowRank
    """n codes of rank 1, of unit norm."""
    components: MatrixPca

    @classmethod
    def fit(
        cls, writes: LowRank, tokens: Integers, *, n_codes: int, components: int, rng: np.random.Generator
    ) -> HeadBaselines:
        """From the writes of a text.

        Args:
            writes: N native writes, sequence by sequence; not all of them 0.
            tokens: [N,2] the token before (-1 at the start of a sequence) and the token itself.
            n_codes: drawn writes, and codes of the quantiser; at most as many as there are writes other than 0.
            components: principal components.

        Cost: N K V for the means, 10 N n_codes (K + V) for the quantiser, 17 N K V (components + 6) for PCA; a second
        or two for 16,000 writes of 64 x 32 on one core. Memory: N (K + V) numbers.
        """
        nonzero = np.flatnonzero(writes.norm().cpu().numpy())
        table, everything = pd.DataFrame(tokens, columns=["before", "token"]), np.arange(len(writes))
        by_token = cast(dict[int, Integers], table.groupby("token").indices)
        by_pair = cast(dict[tuple[int, int], Integers], table.groupby(["before", "token"]).indices)
        of_tokens = list(by_token.values())
        drawn = writes.rows(torch.tensor(np.sort(rng.permutation(nonzero)[:n_codes])))
        return cls(
            writes,
            _mean(writes, everything),
            by_token,
            by_pair,
            (_strength(writes, [everything], of_tokens), _strength(writes, of_tokens, list(by_pair.values()))),
            drawn,
            quantiser(writes.rows(torch.tensor(nonzero)), drawn),
            fit_pca(writes, components),
        )

    def written(self, name: str, native: LowRank, tokens: Integers) -> LowRank:
        """What a baseline writes in the place of N native writes, at its own size.

        Args:
            tokens: [N,2] the token before (-1 at the start) and the token itself.
        """
        if name in ("drawn", "quantised"):
            dictionary = self.drawn if name == "drawn" else self.codes
            chosen = dictionary.rows(_best(native, dictionary))
            return chosen * (native.inner(chosen) / chosen.inner(chosen))
        if name == "pca":
            dense = native.dense()
            return _compact(self.components.project(dense.flatten(1), len(self.components.components)).view_as(dense))
        distinct, which = np.unique(tokens, axis=0, return_inverse=True)
        depth = ("head_mean", "token_mean", "pair_mean").index(name)
        means = [self.shrunk_mean(before, token, depth) for before, token in distinct.tolist()]
        return _compact(torch.stack(means)).rows(torch.tensor(which.ravel())).to(native.values)

    def shrunk_mean(self, before: int, token: int, depth: int) -> Tensor:
        """[K,V] the head's mean write (depth 0), that of a token, shrunk towards it (1), or that of a token pair,
        shrunk towards the token's (2). What does not occur has the mean above it."""
        mean = self.mean
        levels = (self.tokens.get(token), self.pairs.get((before, token)))
        for members, strength in list(zip(levels, self.strengths))[:depth]:
            if members is not None:
                weight = len(members) / (len(members) + strength)
                mean = weight * _mean(self.writes, members) + (1 - weight) * mean
        return mean


def tokens_and_before(tokens: Tensor) -> Integers:
    """[T,2] the token before (-1 at the start) and the token, of one sequence [T]."""
    ids = tokens.cpu().numpy().astype(np.int64)
    return np.stack([np.append(-1, ids[:-1]), ids], 1)


def quantiser(writes: LowRank, start: LowRank) -> LowRank:
    """Codes [n] of rank 1 and unit norm that Lloyd's algorithm finds for the directions of `writes`, from `start`.

    The objective is the sum over writes of the squared cosine with the nearest code. A pass gives each write to its
    nearest code, then takes a step of the power method on either side of each code, from inner products of factors
    alone; neither lowers the objective. A code that has no write stays what it is. Cost: N n (K + V) a pass.
    """
    unit = writes.with_norm(torch.ones_like(writes.norm()))
    top = start if start.rank == 1 else LowRank.svd(start.dense(), 1)
    sides = [torch.nn.functional.normalize(side[:, 0], dim=1) for side in (top.keys, top.values)]
    for _ in range(_LLOYD_PASSES):
        nearest = _best(unit, LowRank.rank_one(*sides))
        for side, factors in enumerate((unit.keys, unit.values)):
            x, y = (
                (own * code[nearest][:, None]).sum(-1) for own, code in zip((unit.keys, unit.values), sides)
            )  # [N,R]
            gain = (x * y).sum(1, keepdim=True) * (y if side == 0 else x)
            moved = torch.zeros_like(sides[side]).index_add_(0, nearest, (factors * gain[..., None]).sum(1))
            size = moved.norm(dim=1, keepdim=True)
            sides[side] = torch.where(size > 0, moved / size.clamp_min(torch.finfo(size.dtype).tiny), sides[side])
    return LowRank.rank_one(*sides)


def _best(native: LowRank, dictionary: LowRank) -> Tensor:
    """[N] the entry of a dictionary with the largest |cosine| with each native write."""
    size, step = dictionary.norm(), max(1, _BLOCK // len(dictionary))
    blocks = [native.rows(slice(i, i + step)) for i in range(0, len(native), step)]
    return torch.cat([(block.inners(dictionary) / size).abs().argmax(1) for block in blocks])


def _mean(writes: LowRank, members: Integers) -> Tensor:
    """[K,V] mean of some writes."""
    chosen = writes.rows(torch.tensor(members))
    return chosen.keys.flatten(0, 1).T @ chosen.values.flatten(0, 1) / len(members)


def _compact(matrices: Tensor) -> LowRank:
    """Matrices [N,K,V] as the fewest singular terms that hold `_ENERGY` of each one's squared norm."""
    terms = LowRank.svd(matrices)
    square = terms.keys.square().sum(-1)
    held = square.cumsum(1) / square.sum(1, keepdim=True).clamp_min(torch.finfo(square.dtype).tiny)
    return terms.terms(slice(int((held < _ENERGY).sum(1).max()) + 1))


def _strength(writes: LowRank, outer: Sequence[Integers], inner: Sequence[Integers]) -> float:
    """Variance of the writes within the `inner` groups over the variance of the groups' means within the `outer` ones,
    by the moments of a nested analysis of variance. Infinite where the means vary no more than chance makes them."""
    n, n_inner, n_outer = len(writes), len(inner), len(outer)
    if not n > n_inner > n_outer:
        return np.inf
    outer_size = np.empty(n)
    for members in outer:
        outer_size[members] = len(members)
    spread = n - sum(len(members) ** 2 / outer_size[members[0]] for members in inner)
    above, below = (
        sum(len(members) * float(_mean(writes, members).double().square().sum()) for members in groups)
        for groups in (outer, inner)
    )
    noise = max(float(writes.inner(writes).double().sum()) - below, 0.0) / (n - n_inner)
    varied = (below - above - (n_inner - n_outer) * noise) / spread
    return float(noise / varied) if varied > 0 else np.inf
