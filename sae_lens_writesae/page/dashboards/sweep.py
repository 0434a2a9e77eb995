"""One pass over the evaluation text: what needs the keys and values of every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from sae_lens_writesae.conditions import Factors, norm
from sae_lens_writesae.firings import HeadHook
from sae_lens_writesae.page.dashboards.config import DashboardConfig
from sae_lens_writesae.page.dashboards.memory import Lifetime, lifetimes
from sae_lens_writesae.progress import bar
from sae_lens_writesae.write_cosines import cosines

FINE = np.linspace(-1, 1, 201)
"""Edges by which cosines are counted while text goes by; figures merge them."""


class Atoms(NamedTuple):
    """The n atoms that get a page."""

    number: NDArray[np.int64]
    factors: Factors
    v: Tensor
    """[n,K] unit key side of the leading term."""
    w: Tensor
    """[n,V] unit value side of the leading term."""
    rank_share: NDArray[np.float64]

    @classmethod
    def of(cls, number: NDArray[np.int64], factors: Factors) -> Atoms:
        """From atoms that are not zero. For rank 1 the leading term is the atom; otherwise it costs an SVD each."""
        if factors.keys.shape[1] == 1:
            v, w = factors.keys[:, 0], factors.values[:, 0]
            share = np.ones(len(number))
        else:
            leading = Factors.svd(factors.dense(), 1, balanced=True)
            v, w = leading.keys[:, 0], leading.values[:, 0]
            share = ((v.norm(dim=-1) * w.norm(dim=-1) / norm(factors)) ** 2).double().cpu().numpy()
        return cls(number, factors, normalize(v, dim=-1), normalize(w, dim=-1), share)


@dataclass
class Sweep:
    """What was gathered, for n atoms. Rows of `table` are the firings of these atoms."""

    table: pd.DataFrame
    """sequence, position, atom, activation, column (0..n-1), cosine (NaN: zero write), key_cosine, value_cosine."""
    silent: NDArray[np.int64]
    """[n,bins of FINE] cosines with the write where the atom does not fire."""
    token_ids: NDArray[np.int64]
    """[U] distinct tokens of the text."""
    token_counts: NDArray[np.int64]
    """[U]"""
    key_means: NDArray[np.float64]
    """[n,U] mean cos(v, k_t) over the occurrences of a token."""
    lives: list[list[Lifetime]]
    """Per atom, one for each followed firing."""


@torch.no_grad()
def sweep(
    model: Any,
    hook: HeadHook,
    tokens: Tensor,
    table: pd.DataFrame,
    atoms: Atoms,
    followed: pd.DataFrame,
    config: DashboardConfig,
    progress: bool,
) -> Sweep:
    """Go through the sequences once.

    Args:
        table: firings of the atoms, ordered by sequence: sequence, position, atom, activation, column.
        followed: the firings whose key side is followed for the half-life.

    Cost: one forward up to the layer per sequence, 2 T n R (K + V) for cosines, and one vector recurrence per followed
    position.
    """
    ids, inverse = np.unique(tokens.cpu().numpy(), return_inverse=True)
    inverse = inverse.reshape(tokens.shape)
    n = len(atoms.number)
    sums, counts = torch.zeros(n, len(ids), dtype=torch.float64), np.zeros(len(ids), dtype=np.int64)
    silent = np.zeros((n, len(FINE) - 1), dtype=np.int64)
    lives: list[list[Lifetime]] = [[] for _ in range(n)]
    found = np.full((3, len(table)), np.nan)
    bounds = np.searchsorted(table["sequence"].to_numpy(), np.arange(len(tokens) + 1))
    for i in bar(range(len(tokens)), "atoms", progress):
        whole = model.recurrence(tokens[i : i + 1], hook.layer)
        one = whole.select(rows=slice(0, 1), heads=slice(hook.head, hook.head + 1))
        writes = _writes(one, atoms)
        matrix = cosines(writes, atoms.factors)  # [T,n]
        key, value = (
            (normalize(side, dim=-1) @ own.T).mean(1)
            for side, own in ((writes.keys, atoms.v), (writes.values, atoms.w))
        )
        own = table.iloc[bounds[i] : bounds[i + 1]]
        where = own["position"].to_numpy(), own["column"].to_numpy()
        written = (norm(writes) > 0).cpu().numpy()
        for row, values in enumerate((matrix, key, value)):
            found[row, bounds[i] : bounds[i + 1]] = np.where(written[where[0]], values.cpu().numpy()[where], np.nan)
        silent += _silent(matrix.cpu().numpy(), where, written)
        sums.index_add_(1, torch.from_numpy(inverse[i][written]), key[torch.from_numpy(written)].T.double().cpu())
        counts += np.bincount(inverse[i][written], minlength=len(ids))
        here: Any = followed[followed["sequence"] == i]
        for life in lifetimes(one, atoms.factors, here, config.half_life_limit):
            lives[life.column].append(life)
    table = table.assign(cosine=found[0], key_cosine=found[1], value_cosine=found[2])
    return Sweep(table, silent, ids, counts, sums.numpy() / np.maximum(counts, 1), lives)


def _writes(one: Any, atoms: Atoms) -> Factors:
    """The native writes of one head as T matrices, in the dtype of the atoms: keys [T,R,K], values [T,R,V]."""
    keys, values = (x[0].flatten(1, -2) for x in (one.k, one.u))
    return Factors(keys.to(atoms.v), values.to(atoms.v))


def _silent(
    matrix: NDArray[Any], firing: tuple[NDArray[Any], NDArray[Any]], written: NDArray[np.bool_]
) -> NDArray[Any]:
    """Counts [n,bins] of the cosines [T,n] at written tokens without a firing."""
    bins = np.clip(np.searchsorted(FINE, matrix, side="right") - 1, 0, len(FINE) - 2)
    keep = np.repeat(written[:, None], matrix.shape[1], 1)
    keep[firing] = False
    flat = (np.arange(matrix.shape[1])[None, :] * (len(FINE) - 1) + bins)[keep]
    return np.bincount(flat, minlength=matrix.shape[1] * (len(FINE) - 1)).reshape(matrix.shape[1], -1)
