"""What can replace a head's write without any training: fitted on text that nothing is tested on.

A trained atom must be compared with these, because each of them recovers a part of a deletion's effect: means of what
the head writes (at any token, at the token, at the token pair), native writes drawn as a dictionary, a vector
quantizer, and principal components. They see the writes that the dictionary saw, in its metric (`experiment.terms`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae.metric import Metric
from writesae_study.head.components import MatrixPca, fit_pca
from writesae_study.head.quantizer import coded, lloyd
from writesae_study.head.writes import compact

Places = NDArray[np.int64]
"""Numbers of some of the N writes."""
Baseline = Literal["head_mean", "token_mean", "pair_mean", "drawn", "quantised", "pca"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)
"""Names of the baselines, as conditions of an experiment."""

N_COMPONENTS = 4
"""Principal components of `pca`."""
_ENERGY = 0.999
"""A mean or a projection is written as the fewest rank-1 terms that hold this share of its squared norm."""


@dataclass(frozen=True, eq=False)
class HeadBaselines:
    """Baselines of one head, from the N writes of a text.

    **Means.** With n_v occurrences of token v, W_v their mean write and W the mean of all: the mean write of the token
    is T_v = w W_v + (1 - w) W with w = n_v / (n_v + m); that of the pair (u, v) is w W_uv + (1 - w) T_v with
    w = n_uv / (n_uv + m'). This is James and Stein's shrinkage with m = (variance within) / (variance between), both by
    the moments of a one-way (nested) analysis of variance. A token without any occurrence has the head's mean.

    **Drawn.** n native writes D_j drawn at random, as a dictionary: the one with the largest |cosine|, at its
    least-squares coefficient <W, D_j> / |D_j|^2.

    **Vector quantizer.** The same with n codes of rank 1 and unit norm from Lloyd's algorithm on the directions of the
    writes (gain-shape: the code with the largest |<W, C_j>|, times <W, C_j>), started from drawn writes.

    **PCA.** The mean and the projection of W - mean on the first components.

    With a metric all of this is fitted to A^1/2 W B^1/2, and what is chosen there is moved back.
    """

    metric: Metric | None
    """None: squared errors."""
    writes: LowRank
    """The N writes that all is fitted on, in the metric, as the fields below are. All is on the host."""
    mean: Tensor
    """[K,V]"""
    tokens: dict[int, Places]
    """Positions of each token among the N writes."""
    pairs: dict[tuple[int, int], Places]
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
        cls,
        native: LowRank,
        tokens: NDArray[np.int64],
        *,
        n_codes: int,
        rng: np.random.Generator,
        metric: Metric | None = None,
    ) -> HeadBaselines:
        """From the writes of a text.

        Args:
            native: N native writes, sequence by sequence; not all of them 0.
            tokens: [N,2] the token before (-1 at the start of a sequence) and the token itself.
            n_codes: drawn writes, and codes of the quantizer; at most as many as there are writes other than 0.
            metric: that of the dictionary which the baselines are compared with.

        Cost: N K V for the means, 10 N n_codes (K + V) for the quantizer, 17 N K V (components + 6) for PCA; a second
        or two for 16,000 writes of 64 x 32 on one core. Memory: N (K + V) numbers.
        """
        writes = metric.move(native) if metric else native
        nonzero = np.flatnonzero(writes.norm().cpu().numpy())
        table = pd.DataFrame(tokens, columns=["before", "token"])
        everything = np.arange(len(writes))
        by_token = cast(dict[int, Places], table.groupby("token").indices)
        by_pair = cast(dict[tuple[int, int], Places], table.groupby(["before", "token"]).indices)
        of_tokens = list(by_token.values())
        directions = writes.rows(torch.tensor(nonzero))
        chosen = np.sort(rng.permutation(nonzero)[:n_codes])
        drawn = writes.rows(torch.tensor(chosen))
        host = writes.on_host()  # means of thousands of small groups, for each of which a GPU would wait
        strength_of_token = _variance_ratio(host, [everything], of_tokens)
        strength_of_pair = _variance_ratio(host, of_tokens, list(by_pair.values()))
        codes = lloyd(directions * (1 / directions.norm()), drawn)
        return cls(
            metric=metric and metric.to("cpu"),
            writes=host,
            mean=_mean_write(host, everything),
            tokens=by_token,
            pairs=by_pair,
            strengths=(strength_of_token, strength_of_pair),
            drawn=drawn.on_host(),
            codes=codes.on_host(),
            components=fit_pca(host, N_COMPONENTS),
        )

    def written(self, name: str, native: LowRank, tokens: NDArray[np.int64]) -> LowRank:
        """What a baseline writes instead of N native writes, at its own size.

        Args:
            tokens: [N,2] the token before (-1 at the start) and the token itself.
        """
        if self.metric is None:
            return self._baseline_writes(name, native, tokens)
        written = self._baseline_writes(name, self.metric.move(native), tokens)
        return self.metric.inverse.move(written)

    def _baseline_writes(self, name: str, x: LowRank, tokens: NDArray[np.int64]) -> LowRank:
        if name in ("drawn", "quantised"):
            return coded(x, self.drawn if name == "drawn" else self.codes)
        if name == "pca":
            dense = x.dense()
            projected = self.components.project(dense.flatten(1), len(self.components.components))
            return compact(projected.view_as(dense), _ENERGY)
        # A pair of tokens occurs many times in a text, and a mean and its SVD cost the same each time.
        distinct, which = np.unique(tokens, axis=0, return_inverse=True)
        depth = ("head_mean", "token_mean", "pair_mean").index(name)
        means = [self.shrunk_mean(before, token, depth) for before, token in distinct.tolist()]
        of_pairs = compact(torch.stack(means), _ENERGY)
        return of_pairs.rows(torch.tensor(which.ravel())).to(x.values)

    def shrunk_mean(self, before: int, token: int, depth: int) -> Tensor:
        """[K,V] the head's mean write (depth 0), that of a token, shrunk towards it (1), or that of a token pair,
        shrunk towards the token's (2). What does not occur has the mean above it."""
        mean = self.mean
        levels = (self.tokens.get(token), self.pairs.get((before, token)))
        for members, strength in list(zip(levels, self.strengths))[:depth]:
            if members is not None:
                weight = len(members) / (len(members) + strength)
                mean = weight * _mean_write(self.writes, members) + (1 - weight) * mean
        return mean


def _mean_write(writes: LowRank, members: Places) -> Tensor:
    """[K,V] mean of some writes."""
    chosen = writes.rows(torch.tensor(members))
    return chosen.keys.flatten(0, 1).T @ chosen.values.flatten(0, 1) / len(members)


def _variance_ratio(writes: LowRank, outer: Sequence[Places], inner: Sequence[Places]) -> float:
    """Variance of the writes within the `inner` groups over the variance of the groups' means within the `outer` ones,
    by the moments of a nested analysis of variance. Infinite where the means vary no more than chance makes them."""
    n = len(writes)
    n_inner = len(inner)
    n_outer = len(outer)
    if not n > n_inner > n_outer:
        return np.inf
    outer_size = np.empty(n)
    for members in outer:
        outer_size[members] = len(members)

    def explained(groups: Sequence[Places]) -> float:
        """Sum over groups of their size times the square of their mean."""
        return sum(len(members) * float(_mean_write(writes, members).double().square().sum()) for members in groups)

    # E[explained by inner - by outer] = (n_inner - n_outer) within + spread between, also where sizes differ.
    spread = n - sum(len(members) ** 2 / outer_size[members[0]] for members in inner)
    of_inner = explained(inner)
    total = float(writes.inner(writes).double().sum())
    within = max(total - of_inner, 0.0) / (n - n_inner)
    between = (of_inner - explained(outer) - (n_inner - n_outer) * within) / spread
    return float(within / between) if between > 0 else np.inf
