"""How long a head keeps what it writes, and what it writes on average."""

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sae_lens_writesae.conditions import Factors, mean_write

HALF_LIFE_LIMIT = 128


class HeadWrites(NamedTuple):
    """The native writes of one head on one sequence, in the dtype of the recurrence."""

    native: Factors  # N = T writes of rank 1
    recurrence: Any  # of this head alone


class HeadProfile(NamedTuple):
    """What is typical of a head."""

    mean_write: Factors  # N = 1
    half_life: float  # tokens, median over writes
    half_life_limit: int  # longest half-life that could be seen


def head_writes(recurrence: Any, head: int, kind: Literal["additive", "corrected"]) -> HeadWrites:
    """Writes k_t u_t^T ("additive") or k_t u~_t^T ("corrected") of batch row 0.

    Cost: one pass if corrected.
    """
    one = recurrence.select(rows=slice(0, 1), heads=slice(head, head + 1))
    values = one.u if kind == "additive" else one.corrected_values()
    return HeadWrites(Factors(one.k[0].to(one.dtype), values[0].to(one.dtype)), one)


def half_lives(recurrence: Any, limit: int = HALF_LIFE_LIMIT, n_starts: int = 24) -> Tensor:
    """Tokens until a write has lost half of its norm, under decay and erase: [n], for evenly spaced writes of
    head 0.

    The key side p_t of a write is followed from p_t0 = k_t0; the half-life is the first t - t0 with |p_t| <
    |k_t0| / 2, or `limit` if that comes later. Only writes with `limit` tokens after them are used (on
    sequences no longer than that: T // 2 tokens, and half-lives are cut there).
    """
    limit = min(limit, recurrence.T // 2)
    starts = torch.linspace(0, recurrence.T - 1 - limit, n_starts).long().unique().tolist()
    lives = []
    for start in starts:
        keys = recurrence.k[0, start].to(recurrence.dtype)
        kept = recurrence.propagate(keys, start, 0)[0, 0, : limit + 1].norm(dim=-1)
        gone = (kept < kept[0] / 2).nonzero()
        lives.append(int(gone[0]) if len(gone) else limit)
    return torch.tensor(lives)


def head_profile(sequences: Iterable[HeadWrites], energy: float) -> HeadProfile:
    """Mean write and half-life over the writes of some sequences."""
    keys, values, lives, limit = [], [], [], HALF_LIFE_LIMIT
    for writes in sequences:
        keys.append(writes.native.keys[:, 0])
        values.append(writes.native.values[:, 0])
        lives.append(half_lives(writes.recurrence))
        limit = min(HALF_LIFE_LIMIT, writes.recurrence.T // 2)
    mean = mean_write(torch.cat(keys), torch.cat(values), energy)
    return HeadProfile(mean, float(torch.cat(lives).median()), limit)
