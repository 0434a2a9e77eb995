"""Which tokens at which positions are predicted."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_lens_writesae.logit_change.config import LogitChangeConfig


class Targets(NamedTuple):
    """Tokens to predict for the n firings of one sequence: the axes are n firings, Z horizons, G rank groups."""

    positions: NDArray[np.int64]
    """[n,Z], t + horizon."""
    tokens: NDArray[np.int64]
    """[n,Z,G] token ids."""
    ranks: NDArray[np.int64]
    """[n,Z,G] their native rank at that position, from 1."""


def choose(logits: Tensor, starts: list[int], config: LogitChangeConfig, sequence: int) -> Targets:
    """One token of each rank group at every horizon of every firing, uniform within the group.

    `logits` [T,vocab] are the native ones. Draws come from a seed of the sequence's own.
    """
    rng = np.random.default_rng([config.seed, sequence])
    positions = np.array(starts)[:, None] + np.array(config.horizons)
    low, high = np.array(config.ranks).T
    ranks = rng.integers(low, high + 1, (*positions.shape, len(low)))
    at, which = np.unique(positions, return_inverse=True)
    best = logits[torch.tensor(at)].topk(int(high.max())).indices.cpu().numpy()  # [positions,highest rank]
    tokens = best[which.reshape(positions.shape)[..., None], ranks - 1]
    return Targets(positions, tokens, ranks)


def check_vocabulary(config: LogitChangeConfig, vocabulary: int) -> None:
    """Raise ValueError where a rank is beyond the vocabulary."""
    highest = max(high for _, high in config.ranks)
    if highest > vocabulary:
        raise ValueError(f"rank {highest} was asked for, but the vocabulary has {vocabulary} tokens; change ranks")
