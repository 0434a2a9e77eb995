"""What one head writes, and how long it keeps that."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from hookpoints import Recurrence
from sae_lens_writesae.atom.low_rank import LowRank

ROUNDING = 1e-12
"""A variance below this share of the mean square is what rounding leaves of equal matrices."""
HALF_LIFE_LIMIT = 128
"""Longest half-life that is looked for, in tokens."""


def head_writes(recurrence: Recurrence, head: int) -> LowRank:
    """The B T native writes of one head, row after row, in the dtype of the recurrence.

    A token that takes R delta steps writes a matrix of rank R.
    """
    keys = recurrence.k[:, :, head].flatten(0, 1).to(recurrence.dtype)
    values = recurrence.u[:, :, head].flatten(0, 1).to(recurrence.dtype)
    return LowRank(keys, values) if keys.ndim == 3 else LowRank.rank_one(keys, values)


def joined(parts: Sequence[LowRank]) -> LowRank:
    """All matrices of some parts, one part after the other."""
    return LowRank(torch.cat([part.keys for part in parts]), torch.cat([part.values for part in parts]))


def half_lives(recurrence: Recurrence, limit: int = HALF_LIFE_LIMIT, n_starts: int = 24) -> Tensor:
    """Tokens until a write has lost half of its norm, [n,H] for n evenly spaced writes of each head on batch row 0.

    The key side p_t of a write is followed from p_t0 = k_t0 (its first term); the half-life is the first t - t0 with
    |p_t| < |k_t0| / 2, or `limit` if that comes later. Only writes with `limit` tokens after them are used; on
    sequences of fewer than 2 `limit` tokens the limit is T // 2. Cost: a vector recurrence for each, all in one batch.
    """
    limit = min(limit, recurrence.T // 2)
    starts = torch.linspace(0, recurrence.T - 1 - limit, n_starts).long().unique()
    keys = recurrence.k[0, starts].to(recurrence.dtype)  # [n,H,K]
    keys = keys if keys.ndim == 3 else keys[:, :, 0]
    after = starts[:, None] + 1 + torch.arange(limit)  # [n,limit]
    later = {}
    for name, x in vars(recurrence).items():
        if isinstance(x, Tensor) and x.ndim > 2 and x.shape[1] == recurrence.T:
            later[name] = x[0, after]
    later["u"] = torch.zeros_like(later["u"][..., :1])
    # A vector is the only column of a state to which nothing is written.
    idle = dataclasses.replace(recurrence, **later | {"initial_state": keys[..., None]})
    at_start = keys.norm(dim=-1)[:, None]
    norms = torch.cat([at_start, idle.states()[..., 0].norm(dim=-1)], 1)  # [n,1+limit,H]
    # A norm that rises again later does not count.
    not_yet_half = (norms >= at_start / 2).long().cumprod(1)
    return not_yet_half.sum(1).clamp_max(limit)
