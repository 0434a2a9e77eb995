"""Erasure: take an atom's component out of the writes at which it fires; which token loses, and does it hold elsewhere?

Source: WriteSAE (arXiv 2605.12770), whose test chooses the token on the firings it then tests it on. Here the token is
chosen on one half of the sequences and tested on the other.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from hookpoints import WriteEdit
from sae_lens_writesae import statistics as stats
from sae_lens_writesae.conditions import Factors, norm, scaled, with_norm
from sae_lens_writesae.evaluation import Claim, Evaluation, Figure, describe
from sae_lens_writesae.firings import Firings, HeadHook, collect_firings, sample_firings, silent_positions
from sae_lens_writesae.head_memory import head_writes
from sae_lens_writesae.interventions import plots
from sae_lens_writesae.interventions.common import (
    FLOOR,
    Estimate,
    add_edit,
    check_at_least,
    checked_hook,
    column_table,
    estimate,
    halves,
    head_atoms,
    log_prob_change,
    token_text,
    windows,
)


@dataclass(frozen=True)
class ErasureConfig:
    """What is erased, and where it is looked at."""

    n_atoms: int | None = 20
    """Atoms drawn uniformly from those that fire often enough in both halves. None: all of them."""
    atoms: tuple[int, ...] | None = None
    """A hand-picked list instead of a draw."""
    select_firings: int = 24
    """At most so many firings of an atom for the choice of its token, dealt over sequences."""
    test_firings: int = 12
    """At most so many for the test, in the other half of the sequences."""
    min_firings: int = 4
    """Firings in each half that an atom needs; those of the test half must lie in at least two sequences."""
    erase: Literal["component", "write"] = "component"
    """Take away the atom's component a_i A_i of the write, or the whole write at its firings."""
    horizon: int = 4
    """The effect is the mean change of a token's log-probability over t..t+horizon."""
    first_position: int = 1
    """Firings before this token are left out."""
    rows_per_run: int = 256
    """Edited rows at once; does not change results."""
    seed: int = 0
    """Of the split, the draw and the controls."""
    label: str = ""
    """Name in reports."""

    def __post_init__(self) -> None:
        if self.erase not in ("component", "write"):
            raise ValueError(f"erase must be 'component' or 'write', found {self.erase!r}")
        least = {
            "n_atoms": 1,
            "select_firings": 2,
            "test_firings": 2,
            "min_firings": 2,
            "horizon": 0,
            "first_position": 0,
        }
        check_at_least(self, least | {"rows_per_run": 1})
        fewest = min(self.select_firings, self.test_firings)
        if self.min_firings > fewest:
            raise ValueError(f"min_firings ({self.min_firings}) is above select_firings or test_firings ({fewest})")
        if self.atoms is not None:
            object.__setattr__(self, "atoms", tuple(int(i) for i in self.atoms))


class Erasure(Evaluation):
    """What erasing atoms does to a token's log-probability, in nats.

    Definition: at a firing (t, i) the write becomes W_t - a_i A_i (or 0, with erase="write"); the effect on a token is
    the mean over t..t+horizon of log p(edited) - log p(native). An atom's token is the one whose log-probability falls
    most on average over the firings of the **selection** half of the sequences; `effect` is measured on the other half.

    Control: the same norm taken from the native write at a random position of the same sequence where the atom is
    silent, looked at on the atom's token. Beside it stands `selected`, the mean on the half that the token was chosen
    on: what a test without a split would report.

    Verdict of claim 8, over all test firings (cluster bootstrap by sequence):
    1. "below the floor": the effect's size is below 1e-5 nats.
    2. "fails": the interval of the effect does not lie below 0.
    3. "explained": the interval of effect - control does not lie below 0: erasing anything does as much.
    4. "holds" otherwise.
    """

    kind: ClassVar[str] = "erasure"
    title: ClassVar[str] = "Does erasing an atom lower a token of its own?"
    COLUMNS: ClassVar[dict[str, dict[str, str]]] = {
        "atoms": {
            "atom": "index in the dictionary",
            "token": "chosen on the selection half",
            "text": "the token as text",
            "n_select": "firings it was chosen on",
            "n": "firings it was tested on",
            "selected": "nats, mean effect on the selection half: biased by the choice",
            "effect": "nats, mean effect on the test half",
            "control": "nats, mean effect of the control on the same token, test half",
            "p": "sign-flip test of effect against control by sequence, Holm-adjusted over atoms",
        },
        "firings": {
            "atom": "index in the dictionary",
            "sequence": "test sequence",
            "position": "token t of the firing",
            "activation": "a_i",
            "effect": "nats, of the erasure on the atom's token",
            "control": "nats, of the control on the atom's token",
            "control_position": "where the control's norm was taken away",
        },
    }

    def estimates(self) -> dict[str, Estimate]:
        """Over all test firings: effect, control, difference."""
        table: Any = self.tables["firings"]
        values = {name: table[name] for name in ("effect", "control")}
        values["difference"] = table["effect"] - table["control"]
        return {name: estimate(x, table["sequence"]) for name, x in values.items()}

    def claims(self) -> list[Claim]:
        """Claim 8 over all firings, and how many atoms show it by themselves."""
        found, atoms = self.estimates(), self.tables["atoms"]
        effect, difference = found["effect"], found["difference"]
        same = float(np.average(atoms["selected"], weights=atoms["n_select"]))
        if abs(effect.mean) < FLOOR:
            outcome, why = "below the floor", f"The effect is smaller than {FLOOR:g} nats."
        elif not effect.high < 0:
            outcome, why = "fails", "On sequences that it was not chosen on, the token does not fall."
        elif not difference.high < 0:
            outcome, why = "explained", "The same norm taken from other writes lowers the token as much."
        else:
            outcome, why = "holds", "The token falls on other sequences, and more than by the control."
        n_sequences = effect.n_clusters
        claim = Claim(
            8,
            "erasing an atom lowers its token",
            f"{effect} nats; {same:+.3g} on the half that the token was chosen on",
            effect.n,
            f"firings of {len(atoms)} atoms in {n_sequences} sequences",
            f"other writes, same norm: {found['control']} nats; difference {difference}",
            outcome,
            why,
        )
        table: Any = atoms
        single = int(((table["p"] < 0.05) & (table["effect"] < table["control"])).sum())
        alone = Claim(
            None,
            "single atoms have a token of their own",
            f"{single} of {len(atoms)} atoms (Holm-adjusted p < 0.05)",
            len(atoms),
            "atoms",
            "sign flips of effect - control by sequence",
            "holds" if single else "fails",
            "At least one atom lowers its token more than the control does." if single else "No atom does by itself.",
        )
        return [claim, alone]

    def figures(self) -> list[Figure]:
        """Pooled effects, and each atom on both halves."""
        found, atoms = self.estimates(), self.tables["atoms"]
        same = float(np.average(atoms["selected"], weights=atoms["n_select"]))
        rows = [
            plots.Row("chosen and tested here", same, same, same, "rival"),
            plots.Row("erased, other half", *found["effect"][:3], "atom"),
            plots.Row("other writes", *found["control"][:3], "soft"),
        ]
        name = f"{self.kind}: {self.label}"
        return [
            Figure(
                "Erased, and controls",
                plots.interval_figure(rows, "change of the atom's token, nats", f"Effect of {name}"),
                "Mean over firings with 95 % intervals by sequence. The first row is biased by the choice of the token.",
            ),
            Figure(
                "What the choice adds",
                plots.scatter_figure(
                    atoms["selected"],
                    atoms["effect"],
                    ("half that the token was chosen on, nats", "other half, nats"),
                    f"Atoms on both halves, {name}",
                ),
                "One point an atom; on the dashed line the choice would add nothing.",
            ),
        ]


class _Draw(NamedTuple):
    """Firings of the chosen atoms in both halves, with a silent position for each."""

    atoms: NDArray[np.int64]
    select: pd.DataFrame
    test: pd.DataFrame
    omitted: dict[str, int]


@torch.no_grad()
def run_erasure(
    model: Any, sae: Any, tokens: Tensor, config: ErasureConfig | None = None, progress: bool = True
) -> Erasure:
    """Erase atoms at their firings on sequences [N,T] that neither model nor SAE was trained on.

    Cost: N forwards up to the SAE's layer, one whole forward for each sequence with firings, and for each firing one
    edited row of horizon + 1 tokens (two in the test half). Memory: one float32 row of the vocabulary for each atom.

    Raises:
        ValueError: an SAE of another head or model, sequences too short or too few, or no atom that fires often enough.
    """
    begin, config = time.perf_counter(), config or ErasureConfig()
    hook = checked_hook(model, sae, tokens, config.first_position + config.horizon + 1)
    drawn = _draw(collect_firings(model, sae, tokens, progress=progress), config)
    column = {int(atom): n for n, atom in enumerate(drawn.atoms)}
    factors = head_atoms(model, sae, hook, drawn.atoms)
    sums = torch.zeros(len(column), model.W_U.shape[1], device=model.cfg.device)
    run = _Run(model, hook, tokens, factors, column, config)
    for found in _changes(run, drawn.select, progress):
        sums.index_add_(0, run.columns(found.firings).to(sums.device), found.change)
    counts = drawn.select.groupby("atom").size().reindex(drawn.atoms).to_numpy()
    means = sums.cpu() / torch.tensor(counts)[:, None]
    chosen = means.argmin(1)
    firings = drawn.test.set_index("firing").assign(effect=0.0, control=0.0)
    for found in _changes(run, drawn.test, progress, controls=True):
        own = chosen[run.columns(found.firings)].to(found.change.device)
        seen = found.change.gather(1, own[:, None])[:, 0].cpu().numpy()
        for name, where in (("effect", ~found.control), ("control", found.control)):
            firings.loc[found.firings["firing"].to_numpy()[where], name] = seen[where]
    selected = means.gather(1, chosen[:, None])[:, 0].numpy()
    tables = {"atoms": _atoms(model, drawn, firings, chosen.numpy(), selected, counts), "firings": firings}
    tables = {name: pd.DataFrame(table, columns=list(Erasure.COLUMNS[name])) for name, table in tables.items()}
    seconds = time.perf_counter() - begin
    rows = len(drawn.select) + 2 * len(drawn.test)
    settings = {"config": asdict(config), "omitted": drawn.omitted, "rows_per_second": rows / seconds}
    split = "half of the sequences, at random, for the choice of tokens; the other half for the test"
    return Erasure(describe(model, sae, label=config.label, seed=config.seed, seconds=seconds, split=split, **settings), tables)


def _draw(firings: Firings, config: ErasureConfig) -> _Draw:
    """Atoms with enough firings in both halves, and their firings."""
    rng = np.random.default_rng(config.seed)
    split = halves(firings.n_sequences, config.seed)
    last = firings.n_positions - 1 - config.horizon
    inside = (firings.position >= config.first_position) & (firings.position <= last)
    counted = []
    for side in split:
        table = firings.frame(inside & np.isin(firings.sequence, side))
        counted.append(table.groupby("atom").agg(n=("position", "size"), sequences=("sequence", "nunique")))
    enough = counted[0][counted[0]["n"] >= config.min_firings].index
    enough = enough.intersection(counted[1].query(f"n >= {config.min_firings} and sequences >= 2").index)
    able = np.sort(enough.to_numpy(np.int64))
    if config.atoms is not None and (missing := sorted(set(config.atoms) - set(able.tolist()))):
        raise ValueError(f"atoms {missing} fire fewer than {config.min_firings} times in one of the halves")
    if len(able) == 0:
        n = len(np.unique(firings.atom))
        raise ValueError(
            f"no atom can be tested: {n} of {firings.n_atoms} fire, none {config.min_firings} times in each half; give "
            "more sequences, or lower min_firings"
        )
    chosen = able if config.atoms is None else np.array(config.atoms)
    if config.atoms is None and config.n_atoms is not None:
        chosen = np.sort(rng.choice(able, min(config.n_atoms, len(able)), replace=False))
    bounds = {"first": config.first_position, "last": last}
    tables = []
    for side, most in zip(split, (config.select_firings, config.test_firings)):
        own = np.isin(firings.sequence, side)
        part = Firings(
            *(getattr(firings, name)[own] for name in ("sequence", "position", "atom", "activation")),
            firings.n_sequences,
            firings.n_positions,
            firings.n_atoms,
        )
        sample = sample_firings(part, chosen, most, **bounds, rng=rng)
        sample["firing"] = np.arange(len(sample))
        tables.append((sample, silent_positions(sample, part, **bounds, rng=rng)))
    (select, _), (test, moved) = tables
    kept = test[test["firing"].isin(moved["firing"])]
    kept = kept.assign(control_position=moved.set_index("firing")["position"].loc[kept["firing"]].to_numpy())
    kept = kept[kept.groupby("atom")["sequence"].transform("nunique") >= 2]
    chosen = np.array([atom for atom in chosen if (kept["atom"] == atom).any()])
    if len(chosen) == 0:
        raise ValueError("every atom fires at every token of its sequences, so nothing can be taken away elsewhere")
    select = select[select["atom"].isin(chosen)]
    return _Draw(chosen, select, kept, {"test firings whose atom is silent nowhere else": len(test) - len(kept)})


class _Run(NamedTuple):
    """What stays the same over all sequences."""

    model: Any
    hook: HeadHook
    tokens: Tensor
    factors: Factors
    column: dict[int, int]  # of an atom in `factors`
    config: ErasureConfig

    def columns(self, firings: pd.DataFrame) -> Tensor:
        return torch.tensor([self.column[atom] for atom in firings["atom"]])


class _Changes(NamedTuple):
    """One batch: rows are firings, erased or as their control."""

    firings: pd.DataFrame
    control: NDArray[np.bool_]
    change: Tensor  # [n,vocab] of log-probabilities


def _changes(run: _Run, table: pd.DataFrame, progress: bool, controls: bool = False) -> Iterator[_Changes]:
    """The firings of `table`, sequence by sequence; with `controls` each of them twice."""
    hook, config = run.hook, run.config
    for sequence, part in tqdm(list(table.groupby("sequence")), desc="erasure", disable=not progress):
        session = run.model.edit_session(run.tokens[[sequence]])
        native = head_writes(session.recurrence(hook.layer), hook.head, "additive").native
        own = run.factors.rows(run.columns(part))
        taken = scaled(own, torch.tensor(part["activation"].to_numpy()).to(own.values))
        positions = part["position"].tolist()
        edits = _edits(hook, positions, taken, native, config.erase, control=False)
        if controls:
            elsewhere = part["control_position"].tolist()
            edits += _edits(hook, elsewhere, taken, native, config.erase, control=True)
            positions += elsewhere
        for found in windows(session, positions, edits, config.horizon + 1, config.rows_per_run):
            rows = np.array(found.rows)
            change = log_prob_change(session, found)
            yield _Changes(part.iloc[rows % len(part)], rows >= len(part), change)


def _edits(
    hook: HeadHook, positions: list[int], taken: Factors, native: Factors, erase: str, control: bool
) -> list[WriteEdit]:
    if erase == "write":
        return [WriteEdit(hook.layer, hook.head, t, mode="delete") for t in positions]
    if control:  # the norm of the component, along the write that is there
        here = native.rows(positions)
        there = norm(here) > 0
        size = torch.where(there, norm(taken).to(here.values), 0)
        unit = with_norm(Factors(here.keys, torch.where(there[:, None, None], here.values, 1)), torch.ones_like(size))
        taken = scaled(unit, size)
    return [add_edit(hook, t, Factors(taken.keys, -taken.values), n) for n, t in enumerate(positions)]


def _atoms(
    model: Any, drawn: _Draw, firings: pd.DataFrame, tokens: NDArray[Any], selected: NDArray[Any], counts: NDArray[Any]
) -> pd.DataFrame:
    """One row an atom."""
    rows, p_values = [], {}
    for n, atom in enumerate(drawn.atoms):
        own: Any = firings[firings["atom"] == atom]
        p_values[str(atom)] = stats.sign_flip_test(own["effect"], own["control"], own["sequence"]).p_value
        means = {"effect": own["effect"].mean(), "control": own["control"].mean()}
        token = {"token": int(tokens[n]), "text": token_text(model, tokens[n])}
        rows.append({"atom": atom, "n_select": int(counts[n]), "n": len(own), "selected": selected[n]} | token | means)
    table = column_table(rows, Erasure.COLUMNS["atoms"])
    table["p"] = list(stats.holm(p_values).values())
    return table
