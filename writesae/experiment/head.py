"""What one head writes, and how long it keeps what it writes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch

from hookpoints import Recurrence
from sae_lens_writesae.atom.low_rank import LowRank, mean_write
from sae_lens_writesae.sae.half_life import HALF_LIFE_LIMIT, half_lives

WriteKind = Literal["additive", "corrected"]
"""The native write: k_t u_t^T, which keeps the erase of a delta rule, or k_t u~_t^T, which contains it."""


class HeadProfile(NamedTuple):
    """What is typical of a head."""

    mean_write: LowRank
    """N = 1, terms by falling size."""
    half_life: float
    """Tokens after which half of a write's norm is left, by decay and erase: the median over writes."""
    half_life_limit: int
    """Longest half-life that could be seen on these sequences."""


def head_writes(recurrence: Recurrence, head: int, kind: WriteKind = "additive") -> LowRank:
    """The T native writes of one head on batch row 0, in the dtype of the recurrence.

    A token that takes R delta steps writes a matrix of rank R. Cost: one pass of the head if corrected.
    """
    one = recurrence.select(rows=slice(0, 1), heads=slice(head, head + 1))
    values = one.u if kind == "additive" else one.corrected_values()
    keys, values = one.k[0, :, 0].to(one.dtype), values[0, :, 0].to(one.dtype)
    return LowRank(keys, values) if keys.ndim == 3 else LowRank.rank_one(keys, values)


def head_profile(recurrences: Iterable[Recurrence], kind: WriteKind = "additive", energy: float = 1.0) -> HeadProfile:
    """Mean write and half-life of a head over some sequences.

    Args:
        recurrences: of the head alone (H = 1), one per sequence.
        energy: the mean write is returned as the fewest terms that hold this share of its squared norm.
    """
    writes: list[LowRank] = []
    lives, limit = [], HALF_LIFE_LIMIT
    for recurrence in recurrences:
        writes.append(head_writes(recurrence, 0, kind))
        lives.append(half_lives(recurrence))
        limit = min(HALF_LIFE_LIMIT, recurrence.T // 2)
    mean = mean_write(torch.cat([w.keys[:, 0] for w in writes]), torch.cat([w.values[:, 0] for w in writes]), energy)
    return HeadProfile(mean, float(torch.cat(lives).median()), limit)
