"""Erasure: take an atom's component out of the writes at which it fires; which token loses, and does it hold elsewhere?

Source: WriteSAE (arXiv 2605.12770), whose test chooses the token on the firings that it then tests it on. Here the
token is chosen on one half of the sequences and tested on the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.steering import Target, token_id
from writesae.experiment.at_firings import OfHalves
from writesae.experiment.evaluation import Result, described
from writesae.experiment.firings import Integers, silent_positions
from writesae.experiment.lab import EditedRows, Lab, Site, Trial
from writesae.experiment.readout import log_prob_change, native_log_prob
from writesae.experiment.tokens import token_text
from writesae.verdict import figures
from writesae.verdict import statistics as stats
from writesae.verdict.finding import Against, Figure, Finding, Paired, said
from writesae.verdict.fits import slopes_of
from writesae.verdict.format import percent, signed
from writesae.verdict.judge import one_is_enough
from writesae.verdict.statistics import Estimate

CONTROLS: dict[str, str] = {
    "elsewhere": "other writes, same norm",
    "random": "random directions, each with a token of its own",
    "wrong": "other tokens of similar probability",
}
"""Columns of the controls, and their names for a reader."""

RELEVANT = 0.01
"""Nats: a change of one percent of a token's probability. The paper reports 0.116 nats."""

Directions = Mapping[str, LowRank]
"""What is ablated, one matrix for each atom: the `atom`, and a `random` direction at unit norm, which is what an
untrained dictionary has for these firings."""

_N_WRONG = 8
"""Tokens of similar probability that stand for "another token"."""


@dataclass(frozen=True, kw_only=True)
class Erasure(OfHalves):
    """At a firing (token t, atom i) the write W_t becomes W_t - a_i A_i (or 0, with `erase="write"`). The **effect** on
    a token is the mean over t..t+horizon of log p(edited) - log p(native), in nats. An atom's token is the one whose
    log-probability falls most on average over the firings of the selection half of the sequences; the effect is
    measured on the other half.

    The controls have the same norm:

    - `random`: one random direction for each atom, taken away at the atom's firings and looked at on a token that was
      chosen for it in the same way. Of as many random directions as the dictionary has atoms it is the one that fits
      the writes at the atom's firings best, on the selection half: an atom fires where it fits, so that it has that
      much in common with its writes whether or not it learned anything.
    - `elsewhere`: taken from the native write at a random position of the same sequence where the atom is silent.
    - `wrong`: the erasure itself, looked at on the eight tokens whose native log-probability on the selection half is
      nearest to that of the atom's token.

    Beside them stands `selected`, the mean effect on the half that the token was chosen on. A test without a split
    would report that number.

    **Verdict** of claim 8: the ladder of `judge` on the mean effect over all test firings, which must lie below 0, and
    on effect - control for each control. Intervals resample sequences and atoms (for a single atom: sequences). An
    effect matters from 0.01 nats on. The floor is what a no-op moves the same tokens. A second claim counts atoms whose
    effect is below every control by itself, by 0.01 nats or more: each has one random direction, and of two random
    directions one is always a little ahead.

    **Doses** (the paper's I.4). m a* A_i is added to the write, where a* is the median activation of the atom at its
    test firings: with negative m at a firing, with positive m where the atom is silent. Claim 24, that an atom raises
    its token where it is put in: the ladder on the mean effect at the largest of `injected` (the paper's own test
    fails), against the same edit looked at on the tokens of similar probability. A claim of this project, that the
    effect follows the dose at firings: the slope of the effect over m by least squares through the origin, for each
    firing, against the slope on those tokens.
    """

    n_atoms: int | None = 20
    """Atoms drawn uniformly from those that fire often enough in both halves. None: all of them."""
    token: Target | None = None
    """Look at this token (id or string) for every atom, instead of choosing one for each."""
    select_firings: int = 24
    """At most this many firings of an atom for the choice of its token, dealt over sequences."""
    test_firings: int = 12
    """At most this many firings of an atom for the test, in the other half of the sequences."""
    erase: Literal["component", "write"] = "component"
    """Take away the atom's component a_i A_i of the write, or the whole write at its firings."""
    doses: tuple[float, ...] = (-0.5, -1.0, -2.0)
    """m: what is added to the write at a firing, in units of the atom's typical component. Empty: no dose curve."""
    injected: tuple[float, ...] = (1.0, 2.0, 4.0)
    """m where the atom is silent. Empty: nothing is put in."""
    horizon: int = 4
    """The effect is the mean change of a token's log-probability over t..t+horizon."""

    kind: ClassVar[str] = "erasure"
    question: ClassVar[str] = "Does erasing an atom lower a token of its own?"
    answers: ClassVar[tuple[int, ...]] = (8, 24)
    least: ClassVar[dict[str, int]] = OfHalves.least | {"select_firings": 2}
    columns: ClassVar[dict[str, dict[str, str]]] = {
        "atoms": described(
            "text",
            atom="index in the dictionary",
            token="token that was chosen on the selection half",
            n_select="firings that the token was chosen on",
            n="firings that it was tested on",
            selected="nats, mean effect on the selection half, which the choice of the token biases",
            effect="nats, mean effect on the test half",
            elsewhere="nats, control: other writes, same token",
            random="nats, control: a random direction, on the token chosen for it",
            wrong="nats, control: the erasure, on tokens of similar probability",
            p="largest p of sign-flip tests against the controls, by sequence; Holm-adjusted over atoms",
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
            "atom sequence position",
            place="firing, or silent: a random position where the atom does not fire",
            dose="m: what is added, in units of the median activation of the atom at its test firings",
            effect="nats, change of the atom's token",
            wrong="nats, the same edit on tokens of similar probability",
        ),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        fewest = min(self.select_firings, self.test_firings)
        if self.min_firings > fewest:
            raise ValueError(f"min_firings ({self.min_firings}) is above select_firings or test_firings ({fewest})")

    # -- measuring

    def measure(self, lab: Lab) -> dict[str, pd.DataFrame]:
        """Cost: two edited rows of horizon + 1 tokens for each firing, three in the test half. Memory: three float32
        rows of the vocabulary for each atom."""
        fixed = None if self.token is None else token_id(lab.model, self.token)
        atoms, select, test = self._draw(lab)
        decoded = lab.atoms(atoms)
        directions = {"atom": decoded, "random": self._fitting(lab, select, decoded)}
        tokens, selected = self._choose(lab, select, directions, fixed)

        def floor(rows: EditedRows) -> Mapping[str, ArrayLike]:
            own = tokens["effect"][:, 0].to(rows.logits.device)
            return {"change": log_prob_change(rows)[:, own].abs().mean(1).cpu().numpy()}

        def changes(rows: EditedRows) -> Mapping[str, ArrayLike]:
            change, column = log_prob_change(rows), _columns(rows.trials)
            is_random = torch.tensor([trial.row["condition"] == "random" for trial in rows.trials])
            token = torch.where(is_random[:, None], tokens["random"][column], tokens["effect"][column])
            looked_at = {"change": token, "wrong": tokens["wrong"][column]}
            return {
                name: change.gather(1, each.to(change.device)).double().mean(1).cpu().numpy()
                for name, each in looked_at.items()
            }

        lab.facts["floor"] = lab.floor(floor, "change", self.horizon + 1)
        lab.facts["split"] = "a random half of the sequences for the choice of tokens, the other half for the test"
        typical = torch.tensor(test.groupby("column")["activation"].median().sort_index().to_numpy())
        parts, doses = [], []
        for site in lab.sites(test, self.kind):
            trials = self._trials(lab, site, directions, ("effect", "random", "elsewhere"))
            parts.append(lab.read(site, trials, changes, self.horizon + 1))
            if trials := self._doses(lab, site, decoded, typical):
                doses.append(lab.read(site, trials, changes, self.horizon + 1))
        table = pd.concat(parts)
        wide = table.pivot(index="firing", columns="condition", values="change")
        wrong = table[table["condition"] == "effect"].set_index("firing")["wrong"]
        firings = test.set_index("firing").join(wide).assign(wrong=wrong)
        rows, p_values, n_select = [], {}, select["atom"].value_counts().to_dict()
        for n, atom in enumerate(atoms.tolist()):
            of_atom, token = firings[firings["atom"] == atom], int(tokens["effect"][n, 0])
            tests = [
                stats.sign_flip_test(of_atom["effect"], of_atom[name], of_atom["sequence"], seed=self.seed)
                for name in CONTROLS
            ]
            p_values[str(atom)] = max(test.p_value for test in tests)
            row = {"atom": atom, "token": token, "text": token_text(lab.model, token), "selected": selected[n]}
            row |= {"n_select": n_select[atom], "n": len(of_atom)}
            rows.append(row | {name: of_atom[name].mean() for name in ("effect", *CONTROLS)})
        return {
            "atoms": pd.DataFrame(rows).assign(p=list(stats.holm(p_values).values())),
            "firings": firings,
            "doses": pd.concat(doses).rename(columns={"change": "effect"}) if doses else pd.DataFrame(),
        }

    def _draw(self, lab: Lab) -> tuple[Integers, pd.DataFrame, pd.DataFrame]:
        """The tested atoms, and their firings in both halves. The column `column` says which of the atoms a firing
        belongs to; the test half has `elsewhere_position`, where the atom is silent."""
        rng, tables = lab.rng(), []
        atoms, bounds, sides = self.drawn(lab, rng)
        for inside, sample in sides:
            sample = sample.rename_axis("firing").reset_index()
            tables.append((sample, silent_positions(sample, inside, **bounds, rng=rng)))
        (select, _), (test, moved) = tables
        n_test, moved = len(test), moved.rename(columns={"position": "elsewhere_position"})
        test = test.merge(moved[["firing", "elsewhere_position"]], on="firing")
        test = test[test.groupby("atom")["sequence"].transform("nunique") >= 2]
        lab.skipped["test firings whose atom is silent nowhere else"] += n_test - len(test)
        atoms = atoms[np.isin(atoms, test["atom"].to_numpy())]
        lab.require(len(atoms) > 0, "every atom fires at every token of its sequences: there is no place elsewhere")
        column = {int(atom): n for n, atom in enumerate(atoms)}
        select = select[select["atom"].isin(atoms)]
        return atoms, *(table.assign(column=table["atom"].map(column)) for table in (select, test))

    def _fitting(self, lab: Lab, firings: pd.DataFrame, atoms: LowRank) -> LowRank:
        """For each of n atoms, of F random directions at unit norm the one with the largest mean inner product with the
        native writes at the atom's firings. Cost: a forward per sequence up to the layer; F products per firing."""
        like = LowRank(*(side[:1].expand(lab.firings().n_atoms, -1, -1) for side in (atoms.keys, atoms.values)))
        drawn = like.random_like(torch.Generator().manual_seed(self.seed))
        drawn = drawn.with_norm(torch.ones(len(drawn)).to(drawn.values))
        products = torch.zeros(len(atoms), len(drawn)).to(drawn.values)
        for sequence, rows in firings.groupby("sequence"):
            writes = lab.native_writes([int(str(sequence))]).rows(rows["position"].tolist()).to(drawn.values)
            column = torch.tensor(rows["column"].tolist(), device=products.device)
            products.index_add_(0, column, writes.cosines(drawn) * writes.norm()[:, None])
        return drawn.rows(products.argmax(1))

    def _choose(
        self, lab: Lab, select: pd.DataFrame, directions: Directions, fixed: int | None
    ) -> tuple[dict[str, Tensor], NDArray[np.float64]]:
        """The token that falls most, for each atom (`effect`) and its random direction (or `fixed`), and tokens of
        similar probability (`wrong`): [n,1] or [n,8]. And [n] the mean effect on the atom's own token."""
        shape = (len(directions["atom"]), lab.model.W_U.shape[1])
        sums = {name: torch.zeros(shape, device=lab.model.cfg.device) for name in ("effect", "random", "native")}

        def add(rows: EditedRows) -> Mapping[str, ArrayLike]:
            change, native = log_prob_change(rows), native_log_prob(rows)
            for name, values in (("effect", change), ("random", change), ("native", native)):
                condition = "effect" if name == "native" else name
                rows_of = [n for n, trial in enumerate(rows.trials) if trial.row["condition"] == condition]
                column = _columns([rows.trials[n] for n in rows_of]).to(sums[name].device)
                sums[name].index_add_(0, column, values[rows_of].to(sums[name]))
            return {}

        for site in lab.sites(select, f"{self.kind}: tokens"):
            lab.read(site, self._trials(lab, site, directions, ("effect", "random")), add, self.horizon + 1)
        counts = torch.tensor(select.groupby("column").size().sort_index().to_numpy())[:, None]
        means = {name: total.cpu() / counts for name, total in sums.items()}
        tokens = {
            name: means[name].argmin(1, keepdim=True) if fixed is None else torch.full((shape[0], 1), fixed)
            for name in ("effect", "random")
        }
        own = tokens["effect"]
        distance = (means["native"] - means["native"].gather(1, own)).abs().scatter(1, own, torch.inf)
        tokens["wrong"] = distance.topk(min(_N_WRONG, shape[1] - 1), largest=False).indices
        return tokens, means["effect"].gather(1, own)[:, 0].double().numpy()

    def _trials(self, lab: Lab, site: Site, directions: Directions, conditions: tuple[str, ...]) -> list[Trial]:
        """What is ablated under each condition at each firing of a site: the atom's component, a random direction of
        its norm, or (`elsewhere`) as much of another write."""
        trials, whole = [], self.erase == "write"
        column, rows = torch.tensor(site.rows["column"].to_numpy()), site.rows
        atom = directions["atom"].rows(column)
        component = atom * torch.tensor(rows["activation"].to_numpy()).to(atom.values)
        for condition in conditions:
            where: list[int] = rows["elsewhere_position" if condition == "elsewhere" else "position"].tolist()
            native, taken = site.at(where), component
            size = (native.norm() if whole else component.norm()).to(native.values)
            if condition == "random":
                taken = directions["random"].rows(column).to(size) * size
            elif condition == "elsewhere":
                there = native.norm()
                taken = native * torch.where(there > 0, size / there.clamp_min(1e-30), 0)
            taken = taken * -1.0
            for n, (firing, of, t) in enumerate(zip(rows["firing"], rows["column"], where)):
                deleted = whole and condition != "random"
                edit = lab.replace(t, None) if deleted else lab.add(t, taken, n)
                trials.append(Trial({"firing": firing, "column": of, "condition": condition}, t, edit))
        return trials

    def _doses(self, lab: Lab, site: Site, atoms: LowRank, typical: Tensor) -> list[Trial]:
        """The atom at every dose, at its firings and where it is silent."""
        trials = []
        for place, doses in (("firing", self.doses), ("silent", self.injected)):
            for row in site.rows.to_dict("records"):
                t, n = row["position" if place == "firing" else "elsewhere_position"], row["column"]
                named = {name: row[name] for name in ("atom", "sequence", "column")}
                for dose in doses:
                    added = atoms.rows([n]) * float(dose * typical[n])
                    of_dose = {"position": t, "place": place, "dose": dose, "condition": "effect"}
                    trials.append(Trial(named | of_dose, t, lab.add(t, added)))
        return trials

    # -- judging

    def findings(self, result: Result) -> list[Finding]:
        """Claim 8 over all firings, how many atoms show it by themselves, claim 24 and the dose curve."""
        firings, atoms, doses = (result.tables[name] for name in ("firings", "atoms", "doses"))
        erased, typical = _pooled(result, firings), float(firings["effect"].abs().median())
        falls, effect = Paired(firings).mean(firings["effect"] < 0), erased.mean("effect")
        pooled = Finding(
            number=8,
            claim="erasing an atom lowers its token",
            effect=effect,
            what="the mean effect on sequences that the token was not chosen on",
            against=erased.beaten("effect", CONTROLS),
            typical=typical,
            floor=result.fact("floor"),
            less=True,
            relevant=RELEVANT,
            shown={"atom ablated": effect} | erased.means(CONTROLS),
            write=signed,
            axis="nats",
            measured=f"falls on {said(falls, percent)} of firings; {signed(selected_effect(result))} on the half that "
            "the token was chosen on",
            of=f"firings of {firings['atom'].nunique()} atoms in {firings['sequence'].nunique()} sequences",
        )
        lower = atoms["effect"] < atoms[list(CONTROLS)].min(axis=1) - RELEVANT
        n_single = int((lower & (atoms["p"] < 0.05)).sum())
        beaten = f"atom lowers its token {RELEVANT:g} nats more than every control."
        single = Finding(
            claim="single atoms have a token of their own",
            ruled=one_is_enough(n_single, effect, f"At least one {beaten}", f"No {beaten}"),
            measured=f"{n_single} of {len(atoms)} atoms (Holm-adjusted p < 0.05 and {RELEVANT:g} nats against every "
            "control)",
            controls="sign flips of effect - control by sequence; the largest p of the three controls counts",
            n=len(atoms),
            of="atoms",
        )
        found = [pooled, single]
        if self.injected:
            silent = dict(list(doses[doses["place"] == "silent"].groupby("dose")))
            curve = {f"m = {dose:g}": _pooled(result, rows).mean("effect") for dose, rows in silent.items()}
            claim, what = "an atom inserted where it is silent raises its token", "the effect where the atom is silent"
            found.append(self._dosed(result, claim, what, silent[max(self.injected)], curve, 24))
        if len(set(self.doses)) > 1:
            at = doses[doses["place"] == "firing"]
            each = ", ".join(f"m = {dose:g}: {signed(x)}" for dose, x in at.groupby("dose")["effect"].mean().items())
            slopes, claim = slopes_of(at), "an atom's token follows its dose at firings"
            slope = self._dosed(result, claim, "the slope of the effect over the dose", slopes, {})
            found.append(replace(slope, axis="nats a dose", measured=each))
        return found

    def _dosed(
        self,
        result: Result,
        claim: str,
        what: str,
        rows: pd.DataFrame,
        curve: Mapping[str, Estimate],
        number: int | None = None,
    ) -> Finding:
        """A claim about columns `effect` and `wrong` of some rows: the effect lies above 0 and above other tokens."""
        pooled, rival = _pooled(result, rows), CONTROLS["wrong"]
        effect, wrong = pooled.mean("effect"), pooled.mean("wrong")
        strongest = [*curve][-1] if curve else "slope"
        return Finding(
            number=number,
            claim=claim,
            effect=effect,
            what=what,
            against={rival: Against(pooled.mean("effect", "wrong"), wrong)},
            typical=float(rows["effect"].abs().median()),
            floor=result.fact("floor"),
            relevant=RELEVANT,
            shown={strongest: effect, rival: wrong} | {m: each for m, each in curve.items() if m != strongest},
            write=signed,
            axis=f"nats at {strongest}",
            of=f"positions of {rows['atom'].nunique()} atoms in {rows['sequence'].nunique()} sequences",
        )

    def panels(self, result: Result) -> list[Figure]:
        """Each atom on both halves."""
        atoms = result.tables["atoms"]
        labels = ("half that the token was chosen on, nats", "other half, nats")
        svg = figures.scatter(
            atoms["selected"], atoms["effect"], labels, f"Atoms on both halves, {self.kind}: {result.label}"
        )
        return [
            Figure("What the choice adds", svg, "One point for each atom; on the dashed line it would add nothing.")
        ]


def selected_effect(result: Result) -> float:
    """Mean effect on the half that tokens were chosen on, over firings, in nats."""
    atoms = result.tables["atoms"]
    return float(np.average(atoms["selected"], weights=atoms["n_select"]))


def _pooled(result: Result, rows: pd.DataFrame) -> Paired:
    return Paired(rows, ("sequence", "atom"), result.evaluation.seed)


def _columns(trials: Sequence[Trial]) -> Tensor:
    return torch.tensor([int(str(trial.row["column"])) for trial in trials], dtype=torch.long)
