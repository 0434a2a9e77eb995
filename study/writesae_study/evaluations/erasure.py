"""Erasure: take an atom's component out of the writes at which it fires; which token loses, and does it hold elsewhere?

Source: WriteSAE (arXiv 2605.12770), whose test chooses the token on the firings that it then tests it on. Here the
token is chosen on one half of the sequences and tested on the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge
from numpy.typing import ArrayLike, NDArray
from pydantic import PositiveInt
from torch import Tensor

from sae_lens_writesae.atom.low_rank import LowRank
from writesae.experiment.firings import Integers, sample_firings
from writesae.experiment.lab import EditedRows, Site, Trial
from writesae.experiment.tokens import token_text
from writesae.page.format import percent
from writesae_study.experiment.at_firings import OfAtoms
from writesae_study.experiment.bench import Bench, trials_at
from writesae_study.experiment.draws import Bounds, draw_atoms, halves, silent_positions
from writesae_study.experiment.evaluation import Result, described
from writesae_study.experiment.readout import log_prob_change, native_log_prob
from writesae_study.head.writes import random_units
from writesae_study.verdict.finding import Finding, Paired, with_interval
from writesae_study.verdict.notation import signed

CONTROL_NAMES: dict[str, str] = {
    "elsewhere": "other writes, same norm",
    "random": "random directions, each with its own token",
    "wrong": "other tokens of similar probability",
}
"""Columns of the controls, and their names for a reader."""

RELEVANT = 0.01
"""Nats: a change of one percent of a token's probability. The paper reports 0.116 nats."""

Directions = Mapping[str, LowRank]
"""What is ablated, one matrix for each atom: the atom (`effect`), and a `random` direction at unit norm, which is what
an untrained dictionary has for these firings."""

RANDOM_IN = "injected at random"
_N_WRONG = 8
"""Tokens of similar probability that stand for "another token"."""


@dataclass(frozen=True, kw_only=True)
class Erasure(OfAtoms):
    """At a firing (token t, atom i) the write W_t becomes W_t - a_i A_i. The **effect** on
    a token is the mean over t..t+horizon of log p(edited) - log p(native), in nats. An atom's token is the one whose
    log-probability falls most on average over the firings of the selection half of the sequences; the effect is
    measured on the other half.

    The controls have the same norm:

    - `random`: one random direction for each atom, ablated at the atom's firings and read on a token that was
      chosen for it in the same way. Of as many random directions as the dictionary has atoms it is the one that fits
      the writes at the atom's firings best, on the selection half: an atom fires where it fits, so that it has that
      much in common with its writes whether or not it learned anything.
    - `elsewhere`: taken from the native write at a random position of the same sequence where the atom is silent.
    - `wrong`: the erasure itself, looked at on the eight tokens whose native log-probability on the selection half is
      nearest to that of the atom's token.

    The column `selected` is the mean effect on the half that the token was chosen on. A test without a split
    would report that number.

    **Verdict** of claim 8: the ladder of `judge` on the mean effect over all test firings, which must be below 0, and
    on effect - control for each control. Intervals resample sequences and atoms (for a single atom: sequences). An
    effect matters from 0.01 nats on. The floor is what a no-op moves the same tokens.

    **Insertion** (the paper's I.4). m a* A_i is added to the write where the atom is silent; a* is the median
    activation of the atom at its test firings. Claim 24, that an atom raises its token there: the ladder on the mean
    effect at the largest of `injected` (the paper's own test fails), against the same edit looked at on the
    tokens of similar
    probability, and against a random direction of the same norm on the token that was chosen for it: a direction that
    lowers a token when it is ablated raises it when it is added, learned or not.
    """

    n_atoms: PositiveInt | None = 20
    """Atoms drawn uniformly from those that fire often enough in both halves. None: all of them."""
    select_firings: Annotated[int, Ge(2)] = 24
    """At most this many firings of an atom for the choice of its token, dealt over sequences."""
    test_firings: PositiveInt = 12
    """At most this many firings of an atom for the test, in the other half of the sequences."""
    min_firings: Annotated[int, Ge(2)] = 4
    """Firings in each half that an atom needs; those of the test half must lie in at least two sequences."""
    injected: tuple[float, ...] = (1.0, 2.0, 4.0)
    """m where the atom is silent. Empty: nothing is inserted."""
    horizon: PositiveInt = 4
    """The effect is the mean change of a token's log-probability over t..t+horizon."""

    columns: ClassVar[dict[str, dict[str, str]]] = {
        "atoms": described(
            "text",
            atom="index in the dictionary",
            token="token that was chosen on the selection half",
            n_select="firings that the token was chosen on",
            selected="nats, mean effect on the selection half, which the choice of the token biases",
        ),
        "firings": described(
            "atom sequence position",
            activation="a_i",
            effect="nats, effect of the erasure on the atom's token",
            elsewhere="nats, control: other writes",
            random="nats, control: a random direction",
            wrong="nats, control: other tokens",
            elsewhere_position="token where the control `elsewhere` ablated the norm",
        ),
        "doses": described(
            "atom sequence",
            position="token where the atom is silent and is inserted",
            dose="m: what is added, in units of the median activation of the atom at its test firings",
            effect="nats, change of the atom's token",
            wrong="nats, the same edit on tokens of similar probability",
            random="nats, a random direction of the same norm in the atom's place, on the token chosen for it",
        ),
    }

    def rules(self) -> dict[str, tuple[bool, str]]:
        return {
            "min_firings": (
                self.min_firings <= min(self.select_firings, self.test_firings),
                "at most select_firings and test_firings",
            )
        }

    # -- measuring

    def measure(self, lab: Bench) -> dict[str, pd.DataFrame]:
        """Cost: two edited rows of horizon + 1 tokens for each firing, three in the test half and two for each of
        `injected`. Memory: three float32 rows of the vocabulary for each atom."""
        # Choose on one half of the sequences: the random directions, and the token of each atom and direction.
        atoms, select, test = self._drawn_halves(lab)
        decoded = lab.atoms(atoms)
        directions = {"effect": decoded, "random": self._fitting_directions(lab, select, decoded)}
        tokens, selected = self._chosen_tokens(lab, select, directions)

        def floor(rows: EditedRows) -> Mapping[str, ArrayLike]:
            of_atoms = tokens["effect"][:, 0].to(rows.logits.device)
            return {"change": log_prob_change(rows)[:, of_atoms].abs().mean(1).cpu().numpy()}

        def changes(rows: EditedRows) -> Mapping[str, ArrayLike]:
            change = log_prob_change(rows)
            column, is_random = _atom_columns(rows)
            # A random direction is read on the token that was chosen for it, an atom on the atom's.
            chosen = torch.where(is_random[:, None], tokens["random"][column], tokens["effect"][column])
            read = {"change": chosen, "wrong": tokens["wrong"][column]}
            means = {name: change.gather(1, ids.to(change.device)).double().mean(1) for name, ids in read.items()}
            return {name: mean.cpu().numpy() for name, mean in means.items()}

        # What rounding alone moves the chosen tokens by.
        lab.facts["floor"] = lab.floor(floor, "change", self.horizon + 1)
        typical = torch.tensor(test.groupby("column")["activation"].median().to_numpy())
        # Test on the other half: an edited run for each condition of each firing.
        tables = []
        for site in lab.sites(test, self.kind):
            trials = self._erasure_trials(lab, site, directions, typical)
            tables.append(lab.read(site, trials, changes, self.horizon + 1))
        table = pd.concat(tables)
        by_firing = test.set_index("firing")
        # One row for each firing, with a column for each erasure; insertions have a table of their own.
        is_insertion = table["condition"].isin(["injected", RANDOM_IN])
        wide = table[~is_insertion].pivot(index="firing", columns="condition", values="change")
        erased = table[table["condition"] == "effect"].set_index("firing")
        firings = by_firing.join(wide).join(erased["wrong"])
        ids = tokens["effect"][:, 0].tolist()
        chosen = {
            "atom": atoms,
            "token": ids,
            "text": [token_text(lab.model, token) for token in ids],
            "selected": selected,
            "n_select": select.groupby("column").size(),
        }
        doses = _dose_table(table).join(by_firing[["atom", "sequence"]], on="firing")
        return {"atoms": pd.DataFrame(chosen), "firings": firings, "doses": doses}

    def _drawn_halves(self, lab: Bench) -> tuple[Integers, pd.DataFrame, pd.DataFrame]:
        """The tested atoms, and their firings in both halves. The column `column` says which of the atoms a firing
        belongs to; the test half has `elsewhere_position`, where the atom is silent."""
        rng = lab.rng()
        firings = lab.firings()
        split = halves(len(lab.tokens), self.seed)
        bounds: Bounds = {"first": self.first_position, "last": firings.n_positions - 1 - self.horizon}
        atoms = draw_atoms(
            firings, split, bounds, rng, min_firings=self.min_firings, n_atoms=self.n_atoms, atoms=self.atoms
        )
        tables = []
        for sequences, most in zip(split, (self.select_firings, self.test_firings)):
            inside = firings.of_sequences(sequences)
            sample = sample_firings(inside, atoms, most, **bounds, rng=rng).rename_axis("firing").reset_index()
            # The positions of the selection half are not read; drawing them keeps the draws of the test half.
            tables.append((sample, silent_positions(sample, inside, **bounds, rng=rng)))
        (select, _), (test, moved) = tables
        n_test = len(test)
        silent = moved.set_index("firing")["position"].rename("elsewhere_position")
        test = test.join(silent, on="firing", how="inner")
        test = test[test.groupby("atom")["sequence"].transform("nunique") >= 2]
        lab.skipped["test firings whose atom is silent nowhere else"] += n_test - len(test)
        atoms = atoms[np.isin(atoms, test["atom"].to_numpy())]
        lab.require(len(atoms) > 0, "every atom fires at every token of its sequences: there is no place elsewhere")

        def numbered(table: pd.DataFrame) -> pd.DataFrame:
            return table.assign(column=pd.Index(atoms).get_indexer(pd.Index(table["atom"])))

        return atoms, numbered(select[select["atom"].isin(atoms)]), numbered(test)

    def _fitting_directions(self, lab: Bench, firings: pd.DataFrame, atoms: LowRank) -> LowRank:
        """For each of n atoms, of F random directions at unit norm the one with the largest mean inner product with the
        native writes at the atom's firings. Cost: a forward per sequence up to the layer; F products per firing."""
        drawn = random_units(atoms, lab.firings().n_atoms, self.seed)
        products = torch.zeros(len(atoms), len(drawn)).to(drawn.values)
        for sequence, rows in firings.groupby("sequence"):
            of_sequence = lab.native_writes([int(str(sequence))])
            writes = of_sequence.rows(rows["position"].tolist()).to(drawn.values)
            column = torch.tensor(rows["column"].tolist(), device=products.device)
            products.index_add_(0, column, writes.cosines(drawn) * writes.norm()[:, None])
        return drawn.rows(products.argmax(1))  # the sums of an atom are over the same firings, as their means are

    def _chosen_tokens(
        self, lab: Bench, select: pd.DataFrame, directions: Directions
    ) -> tuple[dict[str, Tensor], NDArray[np.float64]]:
        """The token that falls most, for each atom (`effect`) and its random direction, and tokens of similar
        probability (`wrong`): [n,1] or [n,8]. And [n] the mean effect on the atom's own token."""
        shape = (len(directions["effect"]), lab.model.W_U.shape[1])
        # Sums over an atom's firings of the change of every token, and of its native log-probability.
        sums = {name: torch.zeros(shape, device=lab.model.cfg.device) for name in ("effect", "random", "native")}

        def add(rows: EditedRows) -> Mapping[str, ArrayLike]:
            change = log_prob_change(rows)
            native = native_log_prob(rows)
            column, is_random = _atom_columns(rows)
            parts = {"effect": (change, ~is_random), "random": (change, is_random), "native": (native, ~is_random)}
            for name, (values, is_summed) in parts.items():
                total = sums[name]
                total.index_add_(0, column[is_summed].to(total.device), values[is_summed].to(total))
            return {}  # sums over firings, for the logits of all of them are gigabytes

        for site in lab.sites(select, f"{self.kind}: tokens"):
            lab.read(site, self._erasure_trials(lab, site, directions), add, self.horizon + 1)
        # The token that falls most on average is the atom's.
        counts = torch.tensor(select.groupby("column").size().to_numpy())[:, None]
        means = {name: total.cpu() / counts for name, total in sums.items()}
        tokens = {name: means[name].argmin(1, keepdim=True) for name in ("effect", "random")}
        chosen = tokens["effect"]
        # Tokens of similar probability stand for "another token".
        native = means["native"]
        distance = (native - native.gather(1, chosen)).abs().scatter(1, chosen, torch.inf)  # never the token itself
        tokens["wrong"] = distance.topk(min(_N_WRONG, shape[1] - 1), largest=False).indices
        return tokens, means["effect"].gather(1, chosen)[:, 0].double().numpy()

    def _erasure_trials(
        self, lab: Bench, site: Site, directions: Directions, typical: Tensor | None = None
    ) -> list[Trial]:
        """What is taken from the write at each firing of a site: the atom's component, and a random direction of its
        norm. In the test half, where the activations `typical` of the atoms are given, also as much of another write
        (`elsewhere`), and what is inserted there (`injected`)."""
        rows = site.rows
        column = torch.tensor(rows["column"].to_numpy())
        activation = torch.tensor(rows["activation"].to_numpy())
        atom = directions["effect"].rows(column)
        component = atom * activation.to(atom.values)
        size = component.norm()
        random = directions["random"].rows(column).to(size)
        added = {("effect", 0.0): component * -1.0, ("random", 0.0): random * -size}
        if typical is not None:
            other = site.at(rows["elsewhere_position"].tolist())
            other_size = other.norm()
            factor = torch.where(other_size > 0, -size / other_size.clamp_min(1e-30), 0)
            added["elsewhere", 0.0] = other * factor
            for m in self.injected:
                inserted = atom * (m * typical[column]).to(atom.values)
                added["injected", m] = inserted
                added[RANDOM_IN, m] = random * inserted.norm()
        trials = []
        for (condition, dose), matrices in added.items():
            where = rows["position" if condition in directions else "elsewhere_position"]
            places = rows[["firing", "column"]].assign(position=where, condition=condition, dose=dose)
            trials += trials_at(places, lab.add, matrices)
        return trials

    # -- judging

    def findings(self, result: Result) -> list[Finding]:
        """Claim 8 over all firings, and claim 24."""
        firings = result.tables["firings"]
        atoms = result.tables["atoms"]
        erased = Paired(firings, ("sequence", "atom"), self.seed)
        effect = erased.mean("effect")
        falls = Paired(firings).mean(firings["effect"] < 0)
        selected = np.average(atoms["selected"], weights=atoms["n_select"])
        pooled = Finding(
            number=8,
            claim="erasing an atom lowers its token",
            effect=effect,
            what="the mean effect on sequences that the token was not chosen on",
            null=CONTROL_NAMES["random"],
            against=erased.beaten("effect", CONTROL_NAMES),
            typical=float(firings["effect"].abs().median()),
            floor=result.fact("floor"),
            less=True,
            relevant=RELEVANT,
            shown={"atom ablated": effect} | erased.means(CONTROL_NAMES),
            write=signed,
            axis="nats",
            measured=f"falls on {with_interval(falls, percent)} of firings; {signed(float(selected))} on the half that "
            "the token was chosen on",
            of=f"firings of {firings['atom'].nunique()} atoms in {firings['sequence'].nunique()} sequences",
        )
        return [pooled] if result.tables["doses"].empty else [pooled, self._insertion_finding(result)]

    def _insertion_finding(self, result: Result) -> Finding:
        """Claim 24, at the largest dose; the smaller ones are shown."""
        by_dose = result.tables["doses"].groupby("dose")
        doses = {m: Paired(rows, ("sequence", "atom"), self.seed) for m, rows in by_dose}
        most = max(self.injected)
        largest = doses.pop(most)
        rows = largest.wide
        raised = largest.mean("effect")
        rivals = {name: CONTROL_NAMES[name] for name in ("random", "wrong")}
        smaller = {f"m = {m:g}": paired.mean("effect") for m, paired in doses.items()}
        return Finding(
            number=24,
            claim="an atom inserted where it is silent raises its token",
            effect=raised,
            what="the effect where the atom is silent",
            null=CONTROL_NAMES["random"],
            against=largest.beaten("effect", rivals),
            typical=float(rows["effect"].abs().median()),
            floor=result.fact("floor"),
            relevant=RELEVANT,
            shown={f"m = {most:g}": raised} | largest.means(rivals) | smaller,
            write=signed,
            axis=f"nats at m = {most:g}",
            of=f"positions of {rows['atom'].nunique()} atoms in {rows['sequence'].nunique()} sequences",
        )


def _dose_table(table: pd.DataFrame) -> pd.DataFrame:
    """Insertions of the atoms, each with the change under a random direction of the same norm."""
    injected = table[table["condition"] == "injected"].set_index(["firing", "dose"])
    at_random = table[table["condition"] == RANDOM_IN].set_index(["firing", "dose"])
    return injected.assign(random=at_random["change"]).rename(columns={"change": "effect"}).reset_index()


def _atom_columns(rows: EditedRows) -> tuple[Tensor, Tensor]:
    """[n] the number of each trial's atom, and whether its random direction is ablated."""
    described = pd.DataFrame([trial.row for trial in rows.trials])
    is_random = described["condition"].isin(["random", RANDOM_IN])
    return torch.tensor(described["column"].to_numpy()), torch.tensor(is_random.to_numpy())
