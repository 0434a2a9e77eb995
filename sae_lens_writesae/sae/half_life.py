"""How long a head keeps what it writes."""

from __future__ import annotations

import torch
from torch import Tensor

from hookpoints import Recurrence

HALF_LIFE_LIMIT = 128
"""Longest half-life that is looked for, in tokens."""


def half_lives(recurrence: Recurrence, limit: int = HALF_LIFE_LIMIT, n_starts: int = 24) -> Tensor:
    """Tokens until a write of head 0 has lost half of its norm, for [n] evenly spaced writes of batch row 0.

    The key side p_t of a write is followed from p_t0 = k_t0; the half-life is the first t - t0 with |p_t| < |k_t0| / 2,
    or `limit` if that comes later. Only writes with `limit` tokens after them are used; on sequences of fewer than
    2 `limit` tokens the limit is T // 2. Cost: a vector recurrence per start.
    """
    limit = min(limit, recurrence.T // 2)
    starts = torch.linspace(0, recurrence.T - 1 - limit, n_starts).long().unique().tolist()
    lives = []
    for start in starts:
        keys = recurrence.k[0, start].to(recurrence.dtype)
        norms = recurrence.propagate(keys, start, 0)[0, 0, : limit + 1].norm(dim=-1)
        gone = (norms < norms[0] / 2).nonzero()
        lives.append(int(gone[0]) if len(gone) else limit)
    return torch.tensor(lives)
