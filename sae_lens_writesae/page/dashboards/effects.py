"""What an atom does to the logits: along the direct path, and through all of the model to first order."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from hookpoints import WriteEdit
from sae_lens_writesae.conditions import norm
from sae_lens_writesae.firings import HeadHook
from sae_lens_writesae.later_heads import Mixer, later_mixers, newest_reads
from sae_lens_writesae.page.dashboards.config import DashboardConfig
from sae_lens_writesae.page.dashboards.sweep import Atoms
from sae_lens_writesae.progress import bar

_TOKENS = 4096
"""Tokens of edited rows per call: more does not fit a CPU's cache."""
_LOGITS = 128_000_000
"""Float32 logits held at once (512 MB), which matters where the vocabulary is large."""


class Measured(NamedTuple):
    """Derivatives with respect to how much is written, for n atoms."""

    mean: NDArray[np.float32]
    """[n,vocab], mean over firings and positions, minus the mean over the vocabulary."""
    n: NDArray[np.int64]
    """Firings behind each."""
    changes: NDArray[np.float64]
    """[n,M] relative change of the reads of later heads, mean over firings; NaN where none was measured."""
    heads: list[tuple[int, Mixer, int]]
    """The M heads, as (layer, mixer, head)."""


def direct_path(model: Any, hook: HeadHook, atoms: Atoms) -> NDArray[np.float32]:
    """w^T W_O^h W_U [n,vocab] for unit w, minus the mean over the vocabulary, to which probabilities are blind.

    The value side of the paper's formula (WriteSAE, arXiv 2605.12770): the gain and gate of the head's norm, later
    blocks and the final norm are not in it.
    """
    with torch.no_grad():
        path = atoms.w.to(model.W_U) @ model.W_O(hook.layer, hook.head).to(model.W_U) @ model.W_U
        return (path - path.mean(-1, keepdim=True)).float().cpu().numpy()


def effect_firings(table: pd.DataFrame, n_positions: int, config: DashboardConfig) -> pd.DataFrame:
    """Up to `effect_firings` of each atom, in different sequences, with room for the horizon.

    All atoms take sequences in one random order, so that few sequences serve all of them: each costs a forward.
    """
    rng = np.random.default_rng([config.seed, 1])
    rows: Any = table[table["position"] < n_positions - config.effect_horizon]
    rows = rows.iloc[rng.permutation(len(rows))].drop_duplicates(["column", "sequence"])
    order = rng.permutation(int(table["sequence"].to_numpy().max()) + 1)
    rows = rows.assign(turn=order[rows["sequence"]]).sort_values("turn", kind="stable")
    chosen = rows.groupby("column").head(config.effect_firings)
    return chosen.sort_values(["sequence", "position", "column"], ignore_index=True)


@torch.no_grad()
def measured(
    model: Any,
    hook: HeadHook,
    tokens: Tensor,
    chosen: pd.DataFrame,
    atoms: Atoms,
    config: DashboardConfig,
    progress: bool,
) -> Measured:
    """d / d eps at eps = 0 where eps |W_t| A / |A| is added to the write, by central differences: of the logits, and of
    what every head of a later layer gives (norm of the derivative over t..t+horizon, over that of what it gives).

    Firings at a zero write are left out. Cost: two edited rows of horizon + 1 tokens per firing.
    """
    total = np.zeros((len(atoms.number), model.W_U.shape[1]), dtype=np.float32)
    counts = np.zeros(len(atoms.number), dtype=np.int64)
    later = later_mixers(model, hook.layer)
    heads: list[tuple[int, Mixer, int]] = [(m.layer, m.mixer, head) for m in later for head in range(m.n_heads)]
    changes: list[list[NDArray[np.float64]]] = [[] for _ in atoms.number]
    sizes = norm(atoms.factors)
    width = config.effect_horizon + 1
    groups: list[Any] = list(chosen.groupby("sequence"))
    with newest_reads(model, later) as reads:
        for sequence, rows in bar(groups, "effects", progress):
            session = model.edit_session(tokens[int(sequence) : int(sequence) + 1])
            native = dict(reads)
            rows = rows.assign(size=_write_norms(session, hook)[rows["position"]])
            for batch in _batches(rows[rows["size"] > 0], total.shape[1], config.effect_horizon):
                edits = [edit for row in batch for edit in _pair(hook, atoms, sizes, row, config.effect_step)]
                stop = batch[-1].position + width
                logits = session.run(edits, stop=stop, batch_size=len(edits)).logits.float()
                for i, row in enumerate(batch):
                    at, pair = row.position - batch[0].position, slice(2 * i, 2 * i + 2)
                    window = slice(row.position, row.position + width)
                    slope = _slope(logits[pair, at : at + width], config.effect_step).mean(0)
                    total[row.column] += (slope - slope.mean()).cpu().numpy()
                    counts[row.column] += 1
                    slopes = (_slope(reads[mixer][pair, at : at + width], config.effect_step) for mixer in later)
                    parts = [_relative(s, native[mixer][0, window]) for s, mixer in zip(slopes, later)]
                    changes[row.column].append(np.concatenate(parts) if parts else np.empty(0))
    total /= np.maximum(counts, 1)[:, None]
    return Measured(total, counts, _means(changes, len(heads)), heads)


def _write_norms(session: Any, hook: HeadHook) -> NDArray[Any]:
    """[T] norms of the native writes of one head."""
    one = session.recurrence(hook.layer).select(heads=slice(hook.head, hook.head + 1))
    return (one.k[0].flatten(1, -2).mT @ one.u[0].flatten(1, -2)).norm(dim=(-2, -1)).cpu().numpy()


def _slope(pair: Tensor, step: float) -> Tensor:
    """The derivative from the rows plus and minus `step`."""
    return (pair[0] - pair[1]) / (2 * step)


def _relative(slope: Tensor, native: Tensor) -> NDArray[np.float64]:
    """[H] norms over the norms of the native reads, both [W,H,V]; NaN where a head reads zero."""
    size = native.double().norm(dim=(0, 2))
    return (slope.double().norm(dim=(0, 2)) / size).where(size > 0, torch.nan).cpu().numpy()


def _means(found: list[list[NDArray[np.float64]]], width: int) -> NDArray[np.float64]:
    """[n,width] means that leave NaN out; NaN where there is nothing else."""
    means = np.full((len(found), width), np.nan)
    for row, parts in zip(means, found):
        for m, values in enumerate(np.array(parts).reshape(len(parts), width).T):
            known = values[~np.isnan(values)]
            if len(known):
                row[m] = known.mean()
    return means


def _pair(hook: HeadHook, atoms: Atoms, sizes: Tensor, row: Any, step: float) -> list[WriteEdit]:
    """The write plus and minus `step` of its norm along the atom."""
    keys, values = atoms.factors.keys[row.column], atoms.factors.values[row.column]
    by = step * row.size / sizes[row.column]
    return [WriteEdit(hook.layer, hook.head, row.position, keys, sign * by * values) for sign in (1, -1)]


def _batches(rows: pd.DataFrame, vocabulary: int, horizon: int) -> list[list[Any]]:
    """Firings in order of position; a batch runs from its first to its last window, so only near ones share one."""
    room = min(_TOKENS, _LOGITS // vocabulary)
    batches: list[list[Any]] = []
    for row in rows.itertuples(index=False):
        length = row.position + horizon + 1 - (batches[-1][0].position if batches else 0)  # type: ignore[operator]
        near = length <= 2 * (horizon + 1)
        if batches and near and 2 * (len(batches[-1]) + 1) * length <= room:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
