"""Erasure: take an atom's component out of the writes at which it fires; which token loses, and does it hold elsewhere?

Source: WriteSAE (arXiv 2605.12770), whose test chooses the token on the firings that it then tests it on. Here the
token is chosen on one half of the sequences and tested on the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.steering import Target, token_id
from writesae.experiment.evaluation import Evaluation
from writesae.experiment.firings import Integers, draw_atoms, halves, sample_firings, silent_positions
from writesae.experiment.lab import EditedRows, Lab, Site, Trial
from writesae.experiment.readout import log_prob_change, native_log_prob
from writesae.experiment.result import Claim, Figure, Result
from writesae.experiment.tokens import token_text
from writesae.verdict import figures
from writesae.verdict import statistics as stats
from writesae.verdict.judge import Against, Verdict, judge, too_little

CONTROLS: dict[str, str] = {
    "elsewhere": "other writes, same norm",
    "random": "random directions, each with a token of its own",
    "wrong": "other tokens of similar probability",
}
"""Columns of the controls, and their names for a reader."""

RELEVANT = 0.01
"""Nats: a change of one percent of a token's probability. The paper reports 0.116 nats."""

_N_WRONG = 8
"""Tokens of similar probability that stand for "another token"."""


class Draw(NamedTuple):
    """The firings of the tested atoms in both halves. Column `column` says which row of `atoms` a firing belongs to."""

    atoms: Integers
    select: pd.DataFrame
    test: pd.DataFrame
    """Has `elsewhere_position`, where the atom is silent."""

    @property
    def typical(self) -> Tensor:
        """[n] median activation of each atom at its test firings."""
        return torch.tensor(self.test.groupby("column")["activation"].median().sort_index().to_numpy())


class Directions(NamedTuple):
    """What is taken away, one matrix for each atom."""

    atom: LowRank
    random: LowRank
    """At unit norm; what an untrained dictionary has for these firings."""


class Tokens(NamedTuple):
    """The tokens that are looked at, [n,1] or [n,8] for n atoms."""

    own: Tensor
    random: Tensor
    """Token of the random direction."""
    wrong: Tensor
    selected: NDArray[np.float64]
    """[n] mean effect of the erasure on the atom's own token, on the half that the token was chosen on."""


@dataclass(frozen=True, kw_only=True)
class Erasure(Evaluation):
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
    atoms: tuple[int, ...] | None = None
    """A hand-picked list instead of a draw."""
    token: Target | None = None
    """Look at this token (id or string) for every atom, instead of choosing one for each."""
    select_firings: int = 24
    """At most this many firings of an atom for the choice of its token, dealt over sequences."""
    test_firings: int = 12
    """At most this many firings of an atom for the test, in the other half of the sequences."""
    min_firings: int = 4
    """Firings in each half that an atom needs; those of the test half must lie in at least two sequences."""
    erase: Literal["component", "write"] = "component"
    """Take away the atom's component a_i A_i of the write, or the whole write at its firings."""
    doses: tuple[float, ...] = (-0.5, -1.0, -2.0)
    """m: what is added to the write at a firing, in units of the atom's typical component. Empty: no dose curve."""
    injected: tuple[float, ...] = (1.0, 2.0, 4.0)
    """m where the atom is silent. Empty: nothing is put in."""
    horizon: int = 4
    """The effect is the mean change of a token's log-probability over t..t+horizon."""
    first_position: int = 1
    """Firings before this token are left out."""

    kind: ClassVar[str] = "erasure"
    question: ClassVar[str] = "Does erasing an atom lower a token of its own?"
    answers: ClassVar[tuple[int, ...]] = (8, 24)
    at_least: ClassVar[dict[str, float]] = {
        "n_atoms": 1,
        "select_firings": 2,
        "test_firings": 2,
        "min_firings": 2,
        "horizon": 0,
        "first_position": 0,
    }
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"erase": ("component", "write")}
    columns: ClassVar[dict[str, dict[str, str]]] = {
        "atoms": {
            "atom": "index in the dictionary",
            "token": "token that was chosen on the selection half",
            "text": "the token as text",
            "n_select": "firings that the token was chosen on",
            "n": "firings that it was tested on",
            "selected": "nats, mean effect on the selection half, which the choice of the token biases",
            "effect": "nats, mean effect on the test half",
            "elsewhere": "nats, control: other writes, same token",
            "random": "nats, control: a random direction, on the token chosen for it",
            "wrong": "nats, control: the erasure, on tokens of similar probability",
            "p": "largest p of sign-flip tests against the controls, by sequence; Holm-adjusted over atoms",
        },
        "firings": {
            "atom": "index in the dictionary",
            "sequence": "row of the evaluation tokens, in the test half",
            "position": "token t of the firing",
            "activation": "a_i",
            "effect": "nats, effect of the erasure on the atom's token",
            "elsewhere": "nats, control: other writes",
            "random": "nats, control: a random direction",
            "wrong": "nats, control: other tokens",
            "elsewhere_position": "token where the control `elsewhere` took the norm away",
        },
        "doses": {
            "atom": "index in the dictionary",
            "sequence": "row of the evaluation tokens, in the test half",
            "position": "token that was edited",
            "place": "firing, or silent: a random position where the atom does not fire",
            "dose": "m: what is added, in units of the median activation of the atom at its test firings",
            "effect": "nats, change of the atom's token",
            "wrong": "nats, the same edit on tokens of similar probability",
        },
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        fewest = min(self.select_firings, self.test_firings)
        if self.min_firings > fewest:
            raise ValueError(f"min_firings ({self.min_firings}) is above select_firings or test_firings ({fewest})")
        if self.atoms is not None and (not self.atoms or len(set(self.atoms)) != len(self.atoms)):
            raise ValueError(f"atoms names each atom once, and at least one; found {list(self.atoms)}")

    @property
    def shortest(self) -> int:
        return self.first_position + self.horizon + 1

    # -- measuring

    def measure(self, lab: Lab) -> dict[str, pd.DataFrame]:
        """Cost: two edited rows of horizon + 1 tokens for each firing, three in the test half. Memory: three float32
        rows of the vocabulary for each atom."""
        fixed = None if self.token is None else token_id(lab.model, self.token)
        draw = self._draw(lab)
        atom = lab.atoms(draw.atoms)
        directions = Directions(atom, self._fitting(lab, draw.select, atom))
        tokens = self._choose(lab, draw, directions, fixed)

        def floor(rows: EditedRows) -> Mapping[str, ArrayLike]:
            own = tokens.own[:, 0].to(rows.logits.device)
            return {"change": log_prob_change(rows)[:, own].abs().mean(1).cpu().numpy()}

        def changes(rows: EditedRows) -> Mapping[str, ArrayLike]:
            change = log_prob_change(rows)
            column = _columns(rows.trials)
            is_random = torch.tensor([trial.row["condition"] == "random" for trial in rows.trials])
            token = torch.where(is_random[:, None], tokens.random[column], tokens.own[column])
            return {"change": _at_tokens(change, token), "wrong": _at_tokens(change, tokens.wrong[column])}

        lab.facts["floor"] = lab.floor(floor, "change", self.horizon + 1)
        lab.facts["split"] = "a random half of the sequences for the choice of tokens, the other half for the test"
        conditions = ("effect", "random", "elsewhere")
        parts, doses = [], []
        for site in lab.sites(draw.test, self.kind):
            parts.append(lab.read(site, self._trials(lab, site, directions, conditions), changes, self.horizon + 1))
            if trials := self._doses(lab, site, directions, draw.typical):
                doses.append(lab.read(site, trials, changes, self.horizon + 1))
        table = pd.concat(parts)
        wide = table.pivot(index="firing", columns="condition", values="change")
        wrong = table[table["condition"] == "effect"].set_index("firing")["wrong"]
        firings = draw.test.set_index("firing").join(wide).assign(wrong=wrong)
        curve = pd.concat(doses).rename(columns={"change": "effect"}) if doses else pd.DataFrame()
        return {"atoms": self._atoms(lab, draw, firings, tokens), "firings": firings, "doses": curve}

    def _draw(self, lab: Lab) -> Draw:
        firings, rng, split = lab.firings(), lab.rng(), halves(len(lab.tokens), self.seed)
        bounds = {"first": self.first_position, "last": firings.n_positions - 1 - self.horizon}
        atoms = draw_atoms(
            firings, split, bounds, rng, min_firings=self.min_firings, n_atoms=self.n_atoms, atoms=self.atoms
        )
        tables = []
        for side, most in zip(split, (self.select_firings, self.test_firings)):
            inside = firings.of_sequences(side)
            sample = sample_firings(inside, atoms, most, **bounds, rng=rng)
            sample["firing"] = np.arange(len(sample))
            tables.append((sample, silent_positions(sample, inside, **bounds, rng=rng)))
        (select, _), (test, moved) = tables
        n_test = len(test)
        test = test.merge(moved[["firing", "position"]], on="firing", suffixes=("", "_moved"))
        test = test.rename(columns={"position_moved": "elsewhere_position"})
        test = test[test.groupby("atom")["sequence"].transform("nunique") >= 2]
        lab.skipped["test firings whose atom is silent nowhere else"] += n_test - len(test)
        atoms = atoms[np.isin(atoms, test["atom"].to_numpy())]
        lab.require(len(atoms) > 0, "every atom fires at every token of its sequences: there is no place elsewhere")
        column = {int(atom): n for n, atom in enumerate(atoms)}
        select = select[select["atom"].isin(atoms)]
        return Draw(atoms, *(table.assign(column=table["atom"].map(column)) for table in (select, test)))

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

    def _choose(self, lab: Lab, draw: Draw, directions: Directions, fixed: int | None) -> Tokens:
        """The token that falls most, for each atom and its random direction (or `fixed`), and tokens of similar
        probability."""
        shape = (len(draw.atoms), lab.model.W_U.shape[1])
        sums = {name: torch.zeros(shape, device=lab.model.cfg.device) for name in ("effect", "random", "native")}

        def add(rows: EditedRows) -> Mapping[str, ArrayLike]:
            change, native = log_prob_change(rows), native_log_prob(rows)
            for name, condition, values in (
                ("effect", "effect", change),
                ("random", "random", change),
                ("native", "effect", native),
            ):
                rows_of = [n for n, trial in enumerate(rows.trials) if trial.row["condition"] == condition]
                column = _columns([rows.trials[n] for n in rows_of]).to(sums[name].device)
                sums[name].index_add_(0, column, values[rows_of].to(sums[name]))
            return {}

        for site in lab.sites(draw.select, f"{self.kind}: tokens"):
            lab.read(site, self._trials(lab, site, directions, ("effect", "random")), add, self.horizon + 1)
        counts = torch.tensor(draw.select.groupby("atom").size().reindex(draw.atoms).to_numpy())[:, None]
        means = {name: total.cpu() / counts for name, total in sums.items()}
        given = None if fixed is None else torch.full((shape[0], 1), fixed)
        own = means["effect"].argmin(1, keepdim=True) if given is None else given
        random = means["random"].argmin(1, keepdim=True) if given is None else given
        distance = (means["native"] - means["native"].gather(1, own)).abs().scatter(1, own, torch.inf)
        wrong = distance.topk(min(_N_WRONG, shape[1] - 1), largest=False).indices
        return Tokens(own, random, wrong, means["effect"].gather(1, own)[:, 0].double().numpy())

    def _trials(self, lab: Lab, site: Site, directions: Directions, conditions: tuple[str, ...]) -> list[Trial]:
        trials = []
        firings = list(zip(site.rows["firing"], site.rows["column"]))
        for condition in conditions:
            where: list[int] = site.rows["elsewhere_position" if condition == "elsewhere" else "position"].tolist()
            taken = self._taken(site, directions, condition, where)
            taken = None if taken is None else taken * -1.0
            for n, ((firing, column), t) in enumerate(zip(firings, where)):
                edit = lab.replace(t, None) if taken is None else lab.add(t, taken, n)
                trials.append(Trial({"firing": firing, "column": column, "condition": condition}, t, edit))
        return trials

    def _doses(self, lab: Lab, site: Site, directions: Directions, typical: Tensor) -> list[Trial]:
        """The atom at every dose, at its firings and where it is silent."""
        trials = []
        for place, column, doses in (
            ("firing", "position", self.doses),
            ("silent", "elsewhere_position", self.injected),
        ):
            for row, t in zip(site.rows.to_dict("records"), site.rows[column].tolist()):
                atom = directions.atom.rows([int(row["column"])])
                for dose in doses:
                    named = {name: row[name] for name in ("atom", "sequence", "column")}
                    named |= {"position": t, "place": place, "dose": dose, "condition": "effect"}
                    trials.append(Trial(named, t, lab.add(t, atom * float(dose * typical[int(row["column"])]))))
        return trials

    def _taken(self, site: Site, directions: Directions, condition: str, where: list[int]) -> LowRank | None:
        """What is taken away from the write at each firing of a site; None: the whole write."""
        whole = self.erase == "write"
        if whole and condition != "random":
            return None
        column, native = torch.tensor(site.rows["column"].to_numpy()), site.at(where)
        atom = directions.atom.rows(column)
        component = atom * torch.tensor(site.rows["activation"].to_numpy()).to(atom.values)
        size = (native.norm() if whole else component.norm()).to(native.values)
        if condition == "random":
            return directions.random.rows(column).to(size) * size
        if condition == "elsewhere":
            there = native.norm()
            return native * torch.where(there > 0, size / there.clamp_min(1e-30), 0)
        return component

    def _atoms(self, lab: Lab, draw: Draw, firings: pd.DataFrame, tokens: Tokens) -> pd.DataFrame:
        rows, p_values = [], {}
        n_select = draw.select["atom"].value_counts().to_dict()
        for n, atom in enumerate(draw.atoms.tolist()):
            of_atom = firings[firings["atom"] == atom]
            tests = [
                stats.sign_flip_test(of_atom["effect"], of_atom[name], of_atom["sequence"], seed=self.seed)
                for name in CONTROLS
            ]
            p_values[str(atom)] = max(test.p_value for test in tests)
            token = int(tokens.own[n, 0])
            row = {"atom": atom, "token": token, "text": token_text(lab.model, token), "selected": tokens.selected[n]}
            row |= {"n_select": n_select[atom], "n": len(of_atom)}
            rows.append(row | {name: of_atom[name].mean() for name in ("effect", *CONTROLS)})
        return pd.DataFrame(rows).assign(p=list(stats.holm(p_values).values()))

    # -- judging

    def claims(self, result: Result) -> list[Claim]:
        """Claim 8 over all firings, and how many atoms show it by themselves."""
        firings, verdict = result.tables["firings"], self._verdict(result)
        falls = stats.success_rate(firings["effect"] < 0, firings["sequence"])
        pooled = Claim(
            8,
            "erasing an atom lowers its token",
            f"{mean_effect(result, 'effect')} nats; falls on {falls.rate:.0%} [{falls.wilson.low:.0%}, "
            f"{falls.wilson.high:.0%}] of firings; {selected_effect(result):+.3g} on the half that the token was "
            "chosen on",
            len(firings),
            f"firings of {firings['atom'].nunique()} atoms in {firings['sequence'].nunique()} sequences",
            "; ".join(f"{shown} {mean_effect(result, name)}" for name, shown in CONTROLS.items()),
            verdict.outcome,
            verdict.sentence,
        )
        return [pooled, self._single_atoms(result), *self._dosed(result)]

    def _dosed(self, result: Result) -> list[Claim]:
        """Claim 24 and the dose curve, where they were measured."""
        table, claims = result.tables["doses"], []
        if self.injected:
            silent = table[table["place"] == "silent"]
            curve = {dose: _pooled(rows, "effect", seed=self.seed) for dose, rows in silent.groupby("dose")}
            strongest = silent[silent["dose"] == max(self.injected)]
            claims.append(
                self._against_wrong(
                    result,
                    24,
                    "an atom put in where it is silent raises its token",
                    strongest,
                    "; ".join(f"m = {dose:g}: {effect}" for dose, effect in curve.items()) + " nats",
                    "the mean effect where the atom is silent",
                )
            )
        if len(set(self.doses)) > 1:
            slopes = slopes_of(table[table["place"] == "firing"])
            curve = table[table["place"] == "firing"].groupby("dose")["effect"].mean()
            measured = f"slope {_pooled(slopes, 'effect', seed=self.seed)} nats a dose; "
            measured += ", ".join(f"m = {dose:g}: {effect:+.3g}" for dose, effect in curve.items())
            what = "the slope of the effect over the dose"
            claims.append(
                self._against_wrong(result, None, "an atom's token follows its dose at firings", slopes, measured, what)
            )
        return claims

    def _against_wrong(
        self, result: Result, number: int | None, claim: str, rows: pd.DataFrame, measured: str, what: str
    ) -> Claim:
        """One claim about columns `effect` and `wrong` of some rows: the effect lies above 0 and above other tokens."""
        effect, wrong = (_pooled(rows, name, seed=self.seed) for name in ("effect", "wrong"))
        lead = _pooled(rows.assign(lead=rows["effect"] - rows["wrong"]), "lead", seed=self.seed)
        verdict = judge(
            effect,
            {CONTROLS["wrong"]: Against(lead, wrong)},
            typical=float(rows["effect"].abs().median()),
            floor=result.fact("floor"),
            relevant=RELEVANT,
            what=what,
        )
        unit = f"positions of {rows['atom'].nunique()} atoms in {rows['sequence'].nunique()} sequences"
        return Claim(number, claim, measured, len(rows), unit, f"{CONTROLS['wrong']} {wrong}", *verdict[:2])

    def _verdict(self, result: Result) -> Verdict:
        return judge(
            mean_effect(result, "effect"),
            {shown: Against(mean_effect(result, "effect", name)) for name, shown in CONTROLS.items()},
            typical=float(np.median(np.abs(result.tables["firings"]["effect"].to_numpy(float)))),
            floor=result.fact("floor"),
            less=True,
            relevant=RELEVANT,
            what="the mean effect on sequences that the token was not chosen on",
        )

    def _single_atoms(self, result: Result) -> Claim:
        """A count is no effect with an interval: one atom is enough, and none of too few says nothing."""
        atoms = result.tables["atoms"]
        effect, controls = atoms["effect"].to_numpy(float), atoms[list(CONTROLS)].to_numpy(float)
        n_single = int(np.sum((atoms["p"].to_numpy(float) < 0.05) & (effect < controls.min(1) - RELEVANT)))
        few = too_little(mean_effect(result, "effect"))
        return Claim(
            None,
            "single atoms have a token of their own",
            f"{n_single} of {len(atoms)} atoms (Holm-adjusted p < 0.05 and {RELEVANT:g} nats against every control)",
            len(atoms),
            "atoms",
            "sign flips of effect - control by sequence; the largest p of the three controls counts",
            "holds" if n_single else "inconclusive" if few else "fails",
            f"At least one atom lowers its token {RELEVANT:g} nats more than every control."
            if n_single
            else few or f"No atom lowers its token {RELEVANT:g} nats more than every control.",
        )

    def figures(self, result: Result) -> list[Figure]:
        """Pooled effects, and each atom on both halves."""
        atoms, selected, name = result.tables["atoms"], selected_effect(result), f"{self.kind}: {result.label}"
        unbeaten = self._verdict(result).unbeaten_controls
        short = {"elsewhere": "other writes", "random": "random, own token", "wrong": "other tokens"}
        rows = [
            figures.Row("chosen and tested here", selected, selected, selected, "muted"),
            figures.Row("erased, other half", *mean_effect(result, "effect")[:3], "atom"),
        ]
        for control, shown in CONTROLS.items():
            colour = "control" if shown in unbeaten else "soft"
            rows.append(figures.Row(short[control], *mean_effect(result, control)[:3], colour))
        labels = ("half that the token was chosen on, nats", "other half, nats")
        panels = [
            Figure(
                "Erased, and controls",
                figures.intervals(rows, "change of the atom's token, nats", f"Effect of {name}"),
                "Mean over firings with 95 % intervals. The choice of the token biases the first row. Orange controls "
                "are not beaten.",
            ),
            Figure(
                "What the choice adds",
                figures.scatter(atoms["selected"], atoms["effect"], labels, f"Atoms on both halves, {name}"),
                "One point for each atom; on the dashed line the choice would add nothing.",
            ),
        ]
        return panels + self._dose_panel(result, name)

    def _dose_panel(self, result: Result, name: str) -> list[Figure]:
        rows = [
            figures.Row(f"{place}, {dose:+g}", *_pooled(of_dose, "effect", seed=self.seed)[:3], colour)
            for place, colour in (("firing", "atom"), ("silent", "soft"))
            for dose, of_dose in result.tables["doses"].query("place == @place").groupby("dose")
        ]
        if not rows:
            return []
        svg = figures.intervals(rows, "change of the atom's token, nats", f"Doses of {name}")
        caption = "Added to the write, in units of the atom's typical component; 95 % intervals."
        return [Figure("By dose, at firings and where the atom is silent", svg, caption)]


def slopes_of(doses: pd.DataFrame) -> pd.DataFrame:
    """Slope of `effect` and of `wrong` over the dose, by least squares through the origin, for each edited place."""
    by = ["atom", "sequence", "position"]
    products = doses[by].assign(
        effect=doses["effect"] * doses["dose"], wrong=doses["wrong"] * doses["dose"], square=doses["dose"] ** 2
    )
    sums = products.groupby(by).sum()
    return sums[["effect", "wrong"]].div(sums["square"], axis=0).reset_index()


def mean_effect(result: Result, name: str, minus: str | None = None) -> stats.Estimate:
    """Mean over all test firings of `effect` or a control, in nats; with `minus` the paired difference."""
    table = result.tables["firings"]
    values = table[name] - (table[minus] if minus else 0.0)
    return stats.estimate_two_way(values, table["sequence"], table["atom"], seed=result.evaluation.seed)


def selected_effect(result: Result) -> float:
    """Mean effect on the half that tokens were chosen on, over firings, in nats."""
    atoms = result.tables["atoms"]
    return float(np.average(atoms["selected"], weights=atoms["n_select"]))


def _pooled(rows: pd.DataFrame, name: str, *, seed: int) -> stats.Estimate:
    """Mean of a column; sequences and atoms are both resampled."""
    return stats.estimate_two_way(rows[name], rows["sequence"], rows["atom"], seed=seed)


def _columns(trials: Sequence[Trial]) -> Tensor:
    return torch.tensor([int(str(trial.row["column"])) for trial in trials], dtype=torch.long)


def _at_tokens(change: Tensor, tokens: Tensor) -> NDArray[np.float64]:
    """Mean change of the tokens [n,m] of each row of [n,vocab]."""
    return change.gather(1, tokens.to(change.device)).double().mean(1).cpu().numpy()
