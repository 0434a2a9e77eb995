"""Tokens to aim at, by their rank in the native prediction, and the directions that aim at them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_lens_writesae.interventions.common import special_tokens
from sae_lens_writesae.steering import value_direction


class Stratum(NamedTuple):
    """Tokens of like initial rank; rank 1 is the token that the model predicts."""

    name: str
    low: int
    high: int | None
    """Last rank, included; None: to the end of the vocabulary."""


Strata = list[tuple[Stratum, list[int] | None]]
"""Where targets are drawn from: tokens of some ranks, or a list of tokens."""


class Drawn(NamedTuple):
    """A target and a wrong one of the same stratum."""

    token: int
    rank: int
    wrong: int


def ranks_of(logits: Tensor) -> Tensor:
    """Rank of every token, from 1, in logits [vocab]."""
    ranks = torch.empty(len(logits), dtype=torch.long)
    ranks[logits.argsort(descending=True).cpu()] = torch.arange(1, len(logits) + 1)
    return ranks


def draw_target(
    model: Any, logits: Tensor, stratum: Stratum, rng: np.random.Generator, among: Sequence[int] | None = None
) -> Drawn | None:
    """A uniform draw of a target and a wrong target of a stratum, or of the tokens in `among`; None where there are
    fewer than two. Special tokens are never drawn."""
    ranks = ranks_of(logits).numpy()
    if among is None:
        high = len(ranks) if stratum.high is None else stratum.high
        able = np.flatnonzero((ranks >= stratum.low) & (ranks <= high))
    else:
        able = np.array(sorted(set(among)))
    able = np.setdiff1d(able, list(special_tokens(model)))
    if len(able) < 2:
        return None
    token, wrong = rng.choice(able, 2, replace=False)
    return Drawn(int(token), int(ranks[token]), int(wrong))


class Directions:
    """`value_direction` of tokens, each made once."""

    def __init__(self, model: Any, layer: int, head: int):
        self._place = (model, layer, head)
        self._made: dict[int, Tensor] = {}

    def __call__(self, token: int) -> Tensor:
        """[V], unit norm."""
        if token not in self._made:
            self._made[token] = value_direction(*self._place, token)
        return self._made[token]


def random_unit(like: Tensor, rng: np.random.Generator) -> Tensor:
    """A random direction of the shape of `like` [V]."""
    drawn = torch.tensor(rng.standard_normal(like.shape)).to(like)
    return drawn / drawn.norm()
