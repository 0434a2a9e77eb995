"""Readers: which later heads change most when an atom's write is taken away?

Source: WriteSAE (arXiv 2605.12770), reader traces, which list readers below the atom's own layer. A write reaches the
rest of the model through its own head's reads; only heads of **later layers**, recurrent or attention, at the same or
later tokens, can notice, and only those are looked at here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from hookpoints import WriteEdit
from sae_lens_writesae.conditions import Factors, norm, random_directions, scaled, with_norm
from sae_lens_writesae.evaluation import describe
from sae_lens_writesae.firings import HeadHook, collect_firings, sample_firings
from sae_lens_writesae.interventions.common import (
    Window,
    add_edit,
    by_sequence,
    checked_hook,
    column_table,
    head_atoms,
    windows,
)
from sae_lens_writesae.interventions.draw import draw_atoms, halves, of_sequences
from sae_lens_writesae.interventions.readers_result import CONDITIONS, Readers, ReadersConfig
from sae_lens_writesae.later_heads import LaterMixer, later_mixers, newest_reads
from sae_lens_writesae.progress import bar

_NOTHING = "nothing"
"""A row that adds zero, for the native reads by the same arithmetic."""


@torch.no_grad()
def run_readers(
    model: Any, sae: Any, tokens: Tensor, config: ReadersConfig | None = None, progress: bool = True
) -> Readers:
    """Find the later heads that notice the loss of an atom's write, on sequences [N,T] unseen by model and SAE.

    Cost: N forwards up to the SAE's layer, one whole forward for each sequence with firings, and for each firing four
    edited rows of horizon + 1 tokens.

    An SAE of a layer that none with heads follows gives an empty table and the outcome "not tested".

    Raises:
        ValueError: an SAE of another head or model, sequences too short or too few, no atom that fires often enough.
    """
    begin, config = time.perf_counter(), config or ReadersConfig()
    hook = checked_hook(model, sae, tokens, config.first_position + config.horizon + 1)
    mixers = later_mixers(model, hook.layer)
    if not mixers:
        settings = {"config": asdict(config), "seconds": time.perf_counter() - begin, "conditions": 0}
        info = describe(model, sae, label=config.label, seed=config.seed, **settings)
        return Readers(info, {"changes": column_table([], Readers.COLUMNS["changes"])})
    firings = collect_firings(model, sae, tokens, progress=progress)
    rng = np.random.default_rng(config.seed)
    split = halves(len(tokens), config.seed)
    bounds = {"first": config.first_position, "last": firings.n_positions - 1 - config.horizon}
    atoms = draw_atoms(firings, split, bounds, config, rng)
    parts = []
    for half, side, most in zip(("select", "test"), split, (config.select_firings, config.test_firings)):
        sample = sample_firings(of_sequences(firings, side), atoms, most, **bounds, rng=rng)
        parts.append(sample.assign(half=half))
    table = pd.concat(parts, ignore_index=True).rename_axis("firing").reset_index()
    run = _Run(model, hook, tokens, mixers, atoms, head_atoms(model, sae, hook, atoms), config)
    frames = []
    for sequence, part in bar(by_sequence(table), "readers", progress):
        frames += _sequence(run, sequence, part)
    found = pd.DataFrame(pd.concat(frames, ignore_index=True), columns=list(Readers.COLUMNS["changes"]))
    quiet = found["change"].isna().to_numpy()
    omitted = {"firings x heads that natively give zero": int(quiet.sum()) // len(CONDITIONS)}
    seconds = time.perf_counter() - begin
    settings = {"config": asdict(config), "omitted": omitted, "conditions": 4 * len(table)}
    info = describe(model, sae, label=config.label, seed=config.seed, seconds=seconds, **settings)
    changes: Any = found[~quiet].reset_index(drop=True)
    return Readers(info, {"changes": changes})


class _Run(NamedTuple):
    """What stays the same over sequences."""

    model: Any
    hook: HeadHook
    tokens: Tensor
    mixers: list[LaterMixer]
    atoms: NDArray[np.int64]
    factors: Factors  # one for each atom
    config: ReadersConfig


def _sequence(run: _Run, sequence: int, part: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Every firing of one sequence, under all conditions, at all later heads."""
    session = run.model.edit_session(run.tokens[[sequence]])
    made = _edits(run, sequence, part)
    positions = part["position"].tolist() * len(made)
    edits = [edit for rows in made.values() for edit in rows]
    reads: dict[LaterMixer, Tensor] = {}
    with newest_reads(run.model, run.mixers) as newest:
        for found in windows(session, positions, edits, run.config.horizon + 1, run.config.rows_per_run):
            for mixer in run.mixers:  # the last pass of `windows` is that of these rows
                cut = _cut(newest[mixer], found)
                kept = reads.setdefault(mixer, cut.new_zeros(len(edits), *cut.shape[1:]))
                kept[found.rows] = cut
    for mixer in run.mixers:
        by_condition = reads[mixer].unflatten(0, (len(made), len(part)))  # [C,n,W,H,V]
        yield from _changes(mixer, dict(zip(made, by_condition)), part)


def _cut(reads: Tensor, found: Window) -> Tensor:
    """Each row's own window [n,W,H,V] of reads [n,S,H,V] that begin at the first row's position."""
    offset = (found.positions - found.positions.min()).to(reads.device)
    return reads[torch.arange(len(offset), device=reads.device)[:, None], offset]


def _changes(mixer: LaterMixer, reads: dict[str, Tensor], part: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Relative changes of one mixer's heads."""
    native = reads[_NOTHING]
    size = native.norm(dim=(1, 3))  # [n,H]
    for condition in CONDITIONS:
        gap = (reads[condition] - native).norm(dim=3)  # [n,W,H]
        change = (gap.norm(dim=1) / size).where(size > 0, torch.nan).cpu().numpy()
        peak = gap.argmax(1).cpu().numpy()
        for head in range(mixer.n_heads):
            columns = {"layer": mixer.layer, "mixer": mixer.mixer, "head": head, "condition": condition}
            yield part.assign(**columns, change=change[:, head], peak=peak[:, head])


def _edits(run: _Run, sequence: int, part: pd.DataFrame) -> dict[str, list[WriteEdit]]:
    """What is taken away under each condition, one edit for each firing of `part`."""
    rng = np.random.default_rng([run.config.seed, 8, sequence])
    columns = np.searchsorted(np.sort(run.atoms), part["atom"].to_numpy())
    columns = np.argsort(run.atoms)[columns]
    own = run.factors.rows(columns.tolist())
    own = scaled(own, torch.tensor(part["activation"].to_numpy()).to(own.values))
    size = norm(own)
    step = rng.integers(1, max(2, len(run.atoms)), len(columns))
    another = run.factors.rows(((columns + step) % len(run.atoms)).tolist())
    noise = random_directions(own, torch.Generator().manual_seed(int(rng.integers(2**62))))
    taken = {
        "atom": own,
        "random": with_norm(noise, size),
        "other": with_norm(another, size),
        _NOTHING: scaled(own, torch.zeros_like(size)),
    }
    positions = part["position"].tolist()
    return {
        name: [add_edit(run.hook, t, Factors(what.keys, -what.values), n) for n, t in enumerate(positions)]
        for name, what in taken.items()
    }
