"""Erasure: take an atom's component out of the writes at which it fires; which token loses, and does it hold elsewhere?

Source: WriteSAE (arXiv 2605.12770), whose test chooses the token on the firings it then tests it on. Here the token is
chosen on one half of the sequences and tested on the other.
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
from sae_lens_writesae.errors import NothingToMeasureError
from sae_lens_writesae.evaluation import describe
from sae_lens_writesae.firings import Firings, HeadHook, collect_firings, sample_firings, silent_positions
from sae_lens_writesae.head_memory import head_writes
from sae_lens_writesae.interventions.common import (
    add_edit,
    by_sequence,
    checked_hook,
    column_table,
    head_atoms,
    log_prob_change,
    native_log_prob,
    token_text,
    windows,
)
from sae_lens_writesae.interventions.draw import draw_atoms, halves, of_sequences
from sae_lens_writesae.interventions.erasure_result import CONTROLS, Erasure, ErasureConfig
from sae_lens_writesae.progress import bar
from sae_lens_writesae.steering import token_id
from sae_lens_writesae.verdict import statistics as stats

_WRONG = 8
"""Tokens of like probability that stand for "another token"."""


@torch.no_grad()
def run_erasure(
    model: Any, sae: Any, tokens: Tensor, config: ErasureConfig | None = None, progress: bool = True
) -> Erasure:
    """Erase atoms at their firings on sequences [N,T] that neither model nor SAE was trained on.

    Cost: N forwards up to the SAE's layer, one whole forward for each sequence with firings, and for each firing two
    edited rows of horizon + 1 tokens (three in the test half). Memory: three float32 rows of the vocabulary an atom.

    Raises:
        ValueError: an SAE of another head or model, sequences too short or too few, no atom that fires often enough, or
            a token that is none.
    """
    begin, config = time.perf_counter(), config or ErasureConfig()
    hook = checked_hook(model, sae, tokens, config.first_position + config.horizon + 1)
    given = None if config.token is None else token_id(model, config.token)
    drawn = _draw(collect_firings(model, sae, tokens, progress=progress), config)
    run = _Run.of(model, sae, hook, tokens, drawn.atoms, config)
    chosen = _choose(run, drawn, given, progress)
    firings = drawn.test.set_index("firing").assign(effect=0.0, **dict.fromkeys(CONTROLS, 0.0))
    for found in _changes(run, drawn.test, progress, ("effect", "random", "elsewhere")):
        for name, part in found.by_condition():
            seen = found.change[torch.tensor(part).to(found.change.device)]
            column = run.columns(found.firings.iloc[part])
            rows = found.firings["firing"].to_numpy()[part]
            looked_at = chosen.random if name == "random" else chosen.own
            firings.loc[rows, name] = _at_tokens(seen, looked_at[column])
            if name == "effect":
                firings.loc[rows, "wrong"] = _at_tokens(seen, chosen.wrong[column])
    tables = {"atoms": _atoms(model, drawn, firings, chosen), "firings": firings}
    tables = {name: pd.DataFrame(table, columns=list(Erasure.COLUMNS[name])) for name, table in tables.items()}
    seconds = time.perf_counter() - begin
    rows_run = 2 * len(drawn.select) + 3 * len(drawn.test)
    settings = {"config": asdict(config), "omitted": drawn.omitted, "conditions": rows_run}
    split = "half of the sequences, at random, for the choice of tokens; the other half for the test"
    info = describe(model, sae, label=config.label, seed=config.seed, seconds=seconds, split=split, **settings)
    return Erasure(info, tables)


class _Draw(NamedTuple):
    """Firings of the chosen atoms in both halves, with a silent position for each."""

    atoms: NDArray[np.int64]
    select: pd.DataFrame
    test: pd.DataFrame
    omitted: dict[str, int]


def _draw(firings: Firings, config: ErasureConfig) -> _Draw:
    """Atoms with enough firings in both halves, and their firings."""
    rng = np.random.default_rng(config.seed)
    split = halves(firings.n_sequences, config.seed)
    bounds = {"first": config.first_position, "last": firings.n_positions - 1 - config.horizon}
    chosen = draw_atoms(firings, split, bounds, config, rng)
    tables = []
    for side, most in zip(split, (config.select_firings, config.test_firings)):
        part = of_sequences(firings, side)
        sample = sample_firings(part, chosen, most, **bounds, rng=rng)
        sample["firing"] = np.arange(len(sample))
        tables.append((sample, silent_positions(sample, part, **bounds, rng=rng)))
    (select, _), (test, moved) = tables
    kept = test[test["firing"].isin(moved["firing"])]
    kept = kept.assign(elsewhere_position=moved.set_index("firing")["position"].loc[kept["firing"]].to_numpy())
    kept = kept[kept.groupby("atom")["sequence"].transform("nunique") >= 2]
    chosen = np.array([atom for atom in chosen if (kept["atom"] == atom).any()])
    if len(chosen) == 0:
        raise NothingToMeasureError(
            "every atom fires at every token of its sequences, so nothing can be taken away elsewhere"
        )
    select = select[select["atom"].isin(chosen)]
    return _Draw(chosen, select, kept, {"test firings whose atom is silent nowhere else": len(test) - len(kept)})


class _Run(NamedTuple):
    """What stays the same over all sequences."""

    model: Any
    hook: HeadHook
    tokens: Tensor
    factors: Factors  # one for each atom
    random: Factors  # a direction of unit norm for each atom
    column: dict[int, int]  # of an atom in `factors`
    config: ErasureConfig

    @classmethod
    def of(
        cls, model: Any, sae: Any, hook: HeadHook, tokens: Tensor, atoms: NDArray[np.int64], config: ErasureConfig
    ) -> _Run:
        factors = head_atoms(model, sae, hook, atoms)
        noise = random_directions(factors, torch.Generator().manual_seed(config.seed))
        unit = with_norm(noise, torch.ones(len(atoms)).to(noise.values))
        return cls(model, hook, tokens, factors, unit, {int(atom): n for n, atom in enumerate(atoms)}, config)

    def columns(self, firings: pd.DataFrame) -> Tensor:
        return torch.tensor([self.column[atom] for atom in firings["atom"]])


class _Chosen(NamedTuple):
    """Tokens of each atom, [n,1] or [n,8], and the mean effect of its erasure on its token where it was chosen."""

    own: Tensor
    random: Tensor  # of the random direction
    wrong: Tensor
    selected: NDArray[np.float64]


def _choose(run: _Run, drawn: _Draw, given: int | None, progress: bool) -> _Chosen:
    """The token that falls most, for the atom and its random direction (or the one given), and tokens of like
    probability."""
    shape = (len(drawn.atoms), run.model.W_U.shape[1])
    sums = {name: torch.zeros(shape, device=run.model.cfg.device) for name in ("effect", "random", "native")}
    for found in _changes(run, drawn.select, progress, ("effect", "random")):
        for name, part in found.by_condition():
            columns = run.columns(found.firings.iloc[part]).to(found.change.device)
            index = torch.tensor(part).to(found.change.device)
            sums[name].index_add_(0, columns, found.change[index].to(sums[name]))
            if name == "effect":
                sums["native"].index_add_(0, columns, found.native[index].to(sums[name]))
    counts = torch.tensor(drawn.select.groupby("atom").size().reindex(drawn.atoms).to_numpy())[:, None]
    means = {name: total.cpu() / counts for name, total in sums.items()}
    fixed = None if given is None else torch.full((shape[0], 1), given)
    own = means["effect"].argmin(1, keepdim=True) if fixed is None else fixed
    far = (means["native"] - means["native"].gather(1, own)).abs().scatter(1, own, torch.inf)
    wrong = far.topk(min(_WRONG, shape[1] - 1), largest=False).indices
    random = means["random"].argmin(1, keepdim=True) if fixed is None else fixed
    return _Chosen(own, random, wrong, means["effect"].gather(1, own)[:, 0].double().numpy())


class _Changes(NamedTuple):
    """One batch: rows are firings under one of the conditions."""

    firings: pd.DataFrame
    condition: NDArray[Any]  # name, of each row
    native: Tensor  # [n,vocab] log-probabilities, mean over the window
    change: Tensor  # [n,vocab]

    def by_condition(self) -> Iterator[tuple[str, NDArray[np.int64]]]:
        """Names of conditions with the rows that they have."""
        for name in dict.fromkeys(self.condition.tolist()):
            yield name, np.flatnonzero(self.condition == name)


def _changes(run: _Run, table: pd.DataFrame, progress: bool, conditions: tuple[str, ...]) -> Iterator[_Changes]:
    """The firings of `table` under each of the conditions, sequence by sequence."""
    config = run.config
    for sequence, part in bar(by_sequence(table), "erasure", progress):
        session = run.model.edit_session(run.tokens[[sequence]])
        native = head_writes(session.recurrence(run.hook.layer), run.hook.head, "additive").native
        positions: list[int] = []
        edits: list[WriteEdit] = []
        for name in conditions:
            where = part["elsewhere_position" if name == "elsewhere" else "position"].tolist()
            positions += where
            edits += _edits(run, part, where, native, name)
        for found in windows(session, positions, edits, config.horizon + 1, config.rows_per_run):
            rows = np.array(found.rows)
            names = np.array(conditions)[rows // len(part)]
            before = native_log_prob(session, found)
            yield _Changes(part.iloc[rows % len(part)], names, before, log_prob_change(session, found))


def _edits(run: _Run, part: pd.DataFrame, where: list[int], native: Factors, condition: str) -> list[WriteEdit]:
    """One edit for each firing of `part`, at the positions `where`."""
    hook, columns = run.hook, run.columns(part)
    whole = run.config.erase == "write"
    if whole and condition != "random":
        return [WriteEdit(hook.layer, hook.head, t, mode="delete") for t in where]
    own = run.factors.rows(columns)
    taken = scaled(own, torch.tensor(part["activation"].to_numpy()).to(own.values))
    size = (norm(native.rows(where)) if whole else norm(taken)).to(native.values)
    if condition == "random":
        unit = run.random.rows(columns)
        taken = scaled(Factors(unit.keys.to(size), unit.values.to(size)), size)
    elif condition == "elsewhere":  # the norm of the component, along the write that is there
        here = native.rows(where)
        there = norm(here)
        taken = scaled(here, torch.where(there > 0, size / there.clamp_min(1e-30), 0))
    return [add_edit(hook, t, Factors(taken.keys, -taken.values), n) for n, t in enumerate(where)]


def _at_tokens(change: Tensor, tokens: Tensor) -> NDArray[np.float64]:
    """Mean change of the tokens [n,m] of each row of [n,vocab]."""
    return change.gather(1, tokens.to(change.device)).double().mean(1).cpu().numpy()


def _atoms(model: Any, drawn: _Draw, firings: pd.DataFrame, chosen: _Chosen) -> pd.DataFrame:
    """One row an atom."""
    rows, p_values = [], {}
    counts: Any = drawn.select.groupby("atom").size()
    for n, atom in enumerate(drawn.atoms):
        own: Any = firings[firings["atom"] == atom]
        tests = [stats.sign_flip_test(own["effect"], own[c], own["sequence"]) for c in CONTROLS]
        p_values[str(atom)] = max(test.p_value for test in tests)
        token = int(chosen.own[n, 0])
        described = {"atom": atom, "token": token, "text": token_text(model, token), "selected": chosen.selected[n]}
        means = {name: own[name].mean() for name in ("effect", *CONTROLS)}
        rows.append(described | {"n_select": int(counts[atom]), "n": len(own)} | means)
    table = column_table(rows, Erasure.COLUMNS["atoms"])
    table["p"] = list(stats.holm(p_values).values())
    return table
