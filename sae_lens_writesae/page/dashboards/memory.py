"""How long what an atom writes stays in the state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats

from sae_lens_writesae.conditions import Factors
from sae_lens_writesae.page.dashboards.data import Memory


class Lifetime(NamedTuple):
    """One firing, followed."""

    column: int
    """Which of the atoms."""
    tokens: int
    """First number of tokens after which less than half of the norm is left; if `ended`, how far it was followed."""
    ended: bool
    """The sequence or the limit came first."""


def lifetimes(one: Any, atoms: Factors, followed: pd.DataFrame, limit: int) -> Iterator[Lifetime]:
    """Follow sum_r p_r(t) w_r^T from p_r = v_r at each firing, under decay and erase (closed loop).

    Args:
        one: recurrence of the head alone (B = H = 1).
        followed: firings of one sequence: position, column.
    """
    rank = atoms.keys.shape[1]
    for position, rows in followed.groupby("position"):
        start = int(position)  # type: ignore[call-overload]
        part = one.select(tokens=slice(0, start + limit + 1))
        columns = rows["column"].to_numpy()
        own = atoms.rows(torch.tensor(columns))
        carried = part.propagate(own.keys.flatten(0, 1).to(part.dtype), start, 0)[0]  # [nR,S,K]
        keys = carried.unflatten(0, (len(columns), rank)).movedim(1, 2)  # [n,S,R,K]
        gram = (own.values @ own.values.mT).to(keys)[:, None]
        sizes = ((keys @ keys.mT) * gram).sum((-2, -1)).clamp_min(0).sqrt().cpu().numpy()
        for column, size in zip(columns, sizes):
            gone = np.flatnonzero(size < size[0] / 2)
            yield Lifetime(int(column), int(gone[0]) if len(gone) else len(size) - 1, not len(gone))


def memory(lives: list[Lifetime]) -> Memory:
    """Median over firings. Sequences end before some writes have faded, so it is the median of the Kaplan-Meier
    curve; leaving those firings out would make memories look short."""
    if not lives:
        return Memory(None, 0, 0, 0)
    tokens, ended = np.array([life.tokens for life in lives]), np.array([life.ended for life in lives])
    survival = stats.ecdf(stats.CensoredData.right_censored(tokens, ended)).sf
    below = survival.quantiles[survival.probabilities <= 0.5]
    half_life = float(below[0]) if len(below) else None
    return Memory(half_life, int(tokens.max()), int(ended.sum()), len(lives))
