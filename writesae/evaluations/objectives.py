"""Objectives: dictionaries of one head that were trained for different things, side by side.

The authors of WriteSAE (arXiv 2605.12770) train on states and name a write-aligned loss as what their failures on
larger models lack. An objective here is a target (write, state, last_state) and a loss (`sae.losses.Loss`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sae_lens_writesae.errors import NothingToMeasureError
from sae_lens_writesae.sae.kinds import Objective, objective
from writesae.evaluations.substitution import Substitution, wide_firings
from writesae.experiment.conditions import CONTROLS, REFERENCES, Scale
from writesae.experiment.evaluation import Evaluation, Scope
from writesae.experiment.firings import Integers
from writesae.experiment.lab import Lab
from writesae.experiment.reconstruction import reconstruction
from writesae.experiment.result import Claim, Figure, Result
from writesae.verdict import figures
from writesae.verdict.format import percent, span
from writesae.verdict.judge import Verdict, judge, too_little
from writesae.verdict.names import NAMES
from writesae.verdict.statistics import Estimate, estimate, estimate_difference, success_rate

TESTED_SCALES: tuple[Scale, ...] = ("coefficient", "matched")
"""Scales of the substitution test, each a measure: the share of firings at which the atom beats deletion."""
MEASURES: dict[str, str] = {
    "explained": "variance of its target",
    "reads": "reads of its target",
    "alive": "alive atoms",
    "cosine": "cosine with writes",
    "coefficient": "substitution at its own coefficient",
    "matched": "substitution at matched norm",
}
"""What is measured of each dictionary; the larger the better, all of them."""
WITHIN_TARGET = ("explained", "reads")
"""Measures of what a dictionary was trained on, which mean the same within a target only."""
SIZES = (*WITHIN_TARGET, "cosine")
"""Measures that are means of sizes; all others are shares."""

_SHOWN = {"explained": "variance explained", "reads": "reads explained", "alive": "alive atoms"}
_SHOWN |= {"cosine": "cosine with writes", "coefficient": "atoms, own coefficient", "matched": "atoms, matched norm"}
"""What follows a dictionary's label in a figure."""

RELEVANT = 0.1
"""Difference of two win rates from which on it matters."""


class SubstitutionTest(NamedTuple):
    """The substitution test of one dictionary."""

    wide: pd.DataFrame
    """One row per firing, as `substitution.wide_firings` gives them."""
    n_alive: int
    verdict: Verdict
    """At the scale of the claims."""


class Units(NamedTuple):
    """Observations of one measure of one dictionary, and what each belongs to."""

    values: NDArray[np.float64]
    clusters: Integers


@dataclass(frozen=True, kw_only=True)
class Objectives(Evaluation):
    """Dictionaries of one head that differ in what they were trained for.

    Measured for each: the share of variance explained and the share of reads explained (both of the dictionary's own
    target, so that these are compared within a target only); the share of alive atoms; the signed cosine of atom and
    native write at tested firings; and the substitution win rate, the share of tested firings at which the atom is
    nearer to the native model than deletion, at the dictionary's own coefficient and at the norm of the native write.

    A dictionary wins a measure where its difference from each other one has an interval above 0 (bootstrap: over
    sequences, paired, for reconstruction; over atoms for all others).

    **Verdict** of "training on X substitutes better than training on states by mse", one claim for each other
    objective. It is "not tested" without a dictionary of states by mse, and below the floor where the substitution test
    of either dictionary is. Otherwise the ladder of `judge` on the difference of win rates (10 points matter), then the
    outcome of X's own substitution test (claim 1): X must also beat deletion, and every control that beats deletion.

    "One objective is best at all that it can be compared in" holds where one dictionary wins the substitution and is
    beaten on no measure. It is inconclusive where the substitution of one of them rests on too little data, and fails
    otherwise; it says what wins where.
    """

    reconstruction_sequences: int = 16
    """Sequences whose reconstruction is measured."""
    n_atoms: int = 40
    """Atoms of each dictionary in the substitution test, drawn uniformly from the alive ones."""
    firings_per_atom: int = 3
    """Firings of each of these atoms."""
    scale: Scale = "coefficient"
    """Scale that the claims are about, coefficient or matched. Both are measured: the coefficient of a dictionary of
    states is in units of states, so that its atoms can lose by their size alone."""
    controls: tuple[str, ...] = ("random", "state")
    """Controls of the substitution test."""
    horizon: int = 16
    """KL is averaged over t..t+horizon, both included."""
    alive_tokens: int = 65_536
    """Aliveness is counted on the first so many evaluation tokens (all, where there are fewer)."""
    min_firings: int = 5
    """Firings on those tokens that make an atom alive."""

    kind: ClassVar[str] = "objectives"
    question: ClassVar[str] = "What should a dictionary be trained for?"
    scope: ClassVar[Scope] = Scope.TARGETS
    at_least: ClassVar[dict[str, float]] = {
        "reconstruction_sequences": 2,
        "n_atoms": 2,  # intervals are over atoms
        "firings_per_atom": 1,
        "horizon": 1,
        "alive_tokens": 1,
        "min_firings": 1,
    }
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"scale": TESTED_SCALES, "controls": (*CONTROLS, *REFERENCES)}
    columns: ClassVar[dict[str, dict[str, str]]] = {
        "dictionaries": {
            "sae": "label of the dictionary",
            "target": "what it was trained on: write, state or last_state",
            "loss": "loss that it was trained by: mse, reads or write",
            "d_sae": "number of atoms",
            "l0": "active atoms per token",
            "tested_atoms": "number of atoms in the substitution test",
            "outcome": "outcome of its substitution test",
            "unbeaten": "controls that its atoms are not shown to beat; empty if none",
            "sentence": "why the outcome is what it is",
        },
        "measures": {
            "sae": "label of the dictionary",
            "measure": "explained, reads, alive, cosine; win rates: coefficient, matched, or name of a control",
            "value": "mean: a share, or a cosine",
            "low": "lower end of its 95 % interval",
            "high": "upper end of its 95 % interval",
            "n": "number of observations",
            "clusters": "number of independent units",
            "unit": "what the independent units are",
        },
        "contrasts": {
            "measure": ", ".join(MEASURES),
            "a": "label of one dictionary",
            "b": "label of another that it can be compared with",
            "difference": "mean of a minus mean of b",
            "low": "lower end of its 95 % interval",
            "high": "upper end of its 95 % interval",
        },
        "firings": {
            "sae": "label of the dictionary",
            "sequence": "row of the evaluation tokens",
            "position": "token t that is edited",
            "atom": "atom whose firing was drawn",
            "cosine": "signed cosine of the written atom and the native write",
            "delete": "KL in nats after deletion of the write",
            "coefficient": "KL in nats with the atom in its place, at the dictionary's own coefficient",
            "matched": "KL in nats with the atom in its place, at the norm of the native write",
        },
    }

    @property
    def shortest(self) -> int:
        return self.substitution().shortest

    def substitution(self) -> Substitution:
        """The substitution test of each dictionary."""
        return Substitution(
            n_atoms=self.n_atoms,
            firings_per_atom=self.firings_per_atom,
            atom_choice=("dominant",),
            scales=TESTED_SCALES,
            controls=self.controls,
            horizon=self.horizon,
            last_position_firings=0,
            alive_tokens=self.alive_tokens,
            min_firings=self.min_firings,
            seed=self.seed,
        )

    # -- measuring

    def measure(self, lab: Lab) -> dict[str, pd.DataFrame]:
        fits = reconstruction(lab, range(min(self.reconstruction_sequences, len(lab.tokens))))
        n_fits = fits["sae"].value_counts().reindex(list(lab.saes), fill_value=0)
        lab.require(
            bool((n_fits >= 2).all()),
            f"what {n_fits.idxmin()} was trained on varies on fewer than two sequences: nothing to explain",
        )
        tests = {label: self._tested(lab.only(label), label) for label in lab.saes}
        targets = {label: objective(sae) for label, sae in lab.saes.items()}
        lab.facts["target"] = ", ".join(dict.fromkeys(target for target, _ in targets.values()))
        rows = []
        for label, test in tests.items():
            row = {"sae": label, **targets[label]._asdict(), "d_sae": int(lab.saes[label].cfg.d_sae)}
            row |= {"l0": fits.loc[fits["sae"] == label, "l0"].mean()}
            rows.append(row | self.test_row(test))
        units = {
            label: self.units(tests[label], fits[fits["sae"] == label], row["d_sae"]) for label, row in zip(tests, rows)
        }
        return {
            "dictionaries": pd.DataFrame(rows),
            "measures": self.measures(units),
            "contrasts": self.contrasts(units, targets),
            "firings": pd.concat([firings_of(test, label) for label, test in tests.items()], ignore_index=True),
        }

    def _tested(self, view: Lab, label: str) -> SubstitutionTest:
        try:
            tables = self.substitution().measure(view)
        except NothingToMeasureError as error:
            raise NothingToMeasureError(f"{label}: {error}") from error
        test = self.test(tables["firings"], int(str(view.facts["n_alive"])))
        view.require(
            test.wide["written_atom"].nunique() > 1,
            f"{label}: only one atom can be tested, and an interval needs two; give more tokens",
        )
        return test

    def test(self, table: pd.DataFrame, n_alive: int) -> SubstitutionTest:
        """What the table `firings` of the substitution test says."""
        test = self.substitution()
        wide = wide_firings(Result(test, {}, {"firings": table}))
        return SubstitutionTest(wide, n_alive, test.verdict(wide, self.scale)[0])

    def test_row(self, test: SubstitutionTest) -> dict[str, object]:
        """Columns of the table `dictionaries` that say how the substitution test went."""
        verdict = test.verdict
        described = {"outcome": verdict.outcome, "unbeaten": ", ".join(verdict.unbeaten_controls)}
        return {"tested_atoms": test.wide["written_atom"].nunique(), **described, "sentence": verdict.sentence}

    def units(self, test: SubstitutionTest, fits: pd.DataFrame, d_sae: int) -> dict[str, Units]:
        """Observations of one dictionary by measure: those of `MEASURES`, then the win rates of its controls."""
        wide, atoms = test.wide, np.arange(d_sae)
        alive = np.where(atoms < test.n_alive, 1.0, 0.0)  # which atoms are alive does not matter to a share
        clusters = wide["written_atom"].to_numpy()  # a dictionary's atoms are what its rate is to hold for
        units = {name: Units(fits[name].to_numpy(float), fits["sequence"].to_numpy()) for name in WITHIN_TARGET}
        units["alive"] = Units(alive, atoms)
        units["cosine"] = Units(wide["cosine"].to_numpy(float), clusters)
        for name in (*TESTED_SCALES, *self.controls):
            column = f"atom/{name}" if name in TESTED_SCALES else f"{name}/{self.scale}"
            units[name] = Units(np.where(wide[column] < wide["delete"], 1.0, 0.0), clusters)
        return units

    def measures(self, units: Mapping[str, Mapping[str, Units]]) -> pd.DataFrame:
        """The table `measures`, from observations by dictionary and measure."""
        rows = []
        for names in (MEASURES, self.controls):
            for label, of_sae in units.items():
                for name in names:
                    each = of_sae[name]
                    mean = estimate(*each, seed=self.seed) if name in SIZES else success_rate(*each).over_clusters
                    rows.append((label, name, *mean, "sequences" if name in WITHIN_TARGET else "atoms"))
        return pd.DataFrame(rows, columns=list(self.columns["measures"]))

    def contrasts(self, units: Mapping[str, Mapping[str, Units]], targets: Mapping[str, Objective]) -> pd.DataFrame:
        """The table `contrasts`: every pair of dictionaries that can be compared, in both orders."""
        rows = []
        for name in MEASURES:
            for a, b in itertools.permutations(targets, 2):
                x, y = units[a][name], units[b][name]
                if name not in WITHIN_TARGET:
                    gap = estimate_difference(x.values, y.values, x.clusters, y.clusters, seed=self.seed)
                elif targets[a].target == targets[b].target:  # the same sequences, in the same order
                    gap = estimate(x.values - y.values, x.clusters, seed=self.seed)
                else:
                    continue
                rows.append((name, a, b, gap.mean, gap.low, gap.high))
        return pd.DataFrame(rows, columns=list(self.columns["contrasts"]))

    # -- judging

    def claims(self, result: Result) -> list[Claim]:
        """Each objective against states by mse; what wins where."""
        table = result.tables["dictionaries"].set_index("sae", drop=False)
        base = table[(table["target"] == "state") & (table["loss"] == "mse")]
        if base.empty:
            need = "It needs a dictionary trained on states by mse."
            claim = Claim(None, "another objective substitutes better", "–", 0, "firings", "", "not tested", need)
            return [claim, self._best(result)]
        others = [table.loc[label] for label in table.index if label != base.index[0]]
        return [*(self._better(result, other, base.iloc[0]) for other in others), self._best(result)]

    def _better(self, result: Result, row: pd.Series, base: pd.Series) -> Claim:
        contrasts = result.tables["contrasts"]
        a, b = str(row["sae"]), str(base["sae"])
        mine, theirs = value(result, a, self.scale), value(result, b, self.scale)
        pair = (contrasts["measure"] == self.scale) & (contrasts["a"] == a) & (contrasts["b"] == b)
        difference, low, high = contrasts.loc[pair, ["difference", "low", "high"]].to_numpy(float)[0].tolist()
        gap = Estimate(difference, low, high, mine.n + theirs.n, min(mine.n_clusters, theirs.n_clusters))
        rates = ", ".join(f"{n} {percent(r.mean)} [{span(r.low, r.high)}]" for n, r in ((a, mine), (b, theirs)))
        points = f"{100 * gap.mean:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}] points"
        verdict = _verdict(gap, row, base)
        return Claim(
            None,
            f"training on {_name(row)} substitutes better than training on states by mse",
            f"{rates} beat deletion; difference {points}",
            gap.n,
            f"firings of {mine.n_clusters + theirs.n_clusters} atoms",
            "; ".join(f"{NAMES[c]} {percent(value(result, a, c).mean)} at the firings of {a}" for c in self.controls),
            verdict.outcome,
            verdict.sentence,
        )

    def _best(self, result: Result) -> Claim:
        where = standings(result)
        parts = []
        for key, (leader, tied) in where.items():
            measure, _, target = key.partition("/")
            what = (
                MEASURES[measure].replace("its target", f"{target.replace('_', ' ')}s") if target else MEASURES[measure]
            )
            parts.append(f"{what}: {leader}" + (f" (not beaten: {', '.join(tied)})" if tied else ""))
        labels = list(result.tables["dictionaries"]["sae"])
        winner, tied = where[self.scale]
        lost = beaten_on(result, winner)
        few = [reason for label in labels if (reason := too_little(value(result, label, self.scale))) is not None]
        if few:
            verdict = Verdict("inconclusive", few[0])
        elif tied:
            verdict = Verdict("fails", f"No objective wins the substitution: {winner} does not beat {', '.join(tied)}.")
        elif lost:
            verdict = Verdict("fails", f"{winner} wins the substitution, but is beaten on {', '.join(lost)}.")
        else:
            verdict = Verdict("holds", f"{winner} wins the substitution, and is beaten on no measure of it.")
        claim = "one objective is best at all that it can be compared in"
        return Claim(None, claim, "; ".join(parts), len(labels), "dictionaries", "", *verdict[:2])

    def figures(self, result: Result) -> list[Figure]:
        """Win rates beside the controls, then the other measures."""
        labels = list(result.tables["dictionaries"]["sae"])
        colours = dict.fromkeys(("alive", *TESTED_SCALES), "atom") | {"explained": "ink"}

        def rows(*measures: str) -> list[figures.Row]:
            named = [(label, name) for name in measures for label in labels]
            return [
                figures.Row(f"{a}: {_SHOWN.get(m) or NAMES[m]}", *value(result, a, m)[:3], colours.get(m, "soft"))
                for a, m in named
            ]

        title = f"Win rates by objective: {result.label}"
        rates = rows(*TESTED_SCALES, *self.controls)
        wins = figures.intervals(rates, "% of firings", title, chance=0.5, percent=True)
        others = rows("explained", "reads", "alive", "cosine")
        rest = figures.intervals(others, "share, or cosine", f"Other measures by objective: {result.label}")
        return [
            Figure(
                "Nearer to the native model than deletion",
                wins,
                "Substitution by the dictionary's own atoms, and by controls of the same norm at the same firings.",
            ),
            Figure(
                "Reconstruction, alive atoms, likeness to the write",
                rest,
                "Explained variance and reads are of what each dictionary was trained on.",
            ),
        ]

    def notes(self, result: Result) -> list[str]:
        """What cannot be compared."""
        return ["Writes and states are different things to reconstruct: their explained shares are not compared."]


# ---------------------------------------------------------------------------------------------- reading a result


def value(result: Result, sae: str, measure: str) -> Estimate:
    """One measure of one dictionary."""
    table = result.tables["measures"]
    row = table[(table["sae"] == sae) & (table["measure"] == measure)].iloc[0]
    return Estimate(row["value"], row["low"], row["high"], int(row["n"]), int(row["clusters"]))


def standings(result: Result) -> dict[str, tuple[str, list[str]]]:
    """By measure (and target, where only within one can be compared): the leader, and those that it does not beat."""
    contrasts, table = result.tables["contrasts"], result.tables["dictionaries"]
    groups = {f"/{target}": list(rows["sae"]) for target, rows in table.groupby("target", sort=False)}
    where: dict[str, tuple[str, list[str]]] = {}
    for measure in MEASURES:
        for suffix, labels in groups.items() if measure in WITHIN_TARGET else [("", list(table["sae"]))]:
            if len(labels) < 2:
                continue
            leader = max(labels, key=lambda label: value(result, label, measure).mean)
            ahead = contrasts[(contrasts["measure"] == measure) & (contrasts["a"] == leader) & (contrasts["low"] > 0)]
            beaten = {leader, *ahead["b"]}
            where[measure + suffix] = (leader, [label for label in labels if label not in beaten])
    return where


def beaten_on(result: Result, sae: str) -> list[str]:
    """Measures on which the interval of some other dictionary lies above this one."""
    table = result.tables["contrasts"]
    lost = table[(table["b"] == sae) & (table["low"] > 0)]
    return [MEASURES[measure] for measure in dict.fromkeys(lost["measure"])]


def firings_of(test: SubstitutionTest, label: str) -> pd.DataFrame:
    """The rows of the table `firings` of one dictionary."""
    columns = test.wide[["sequence", "position", "atom", "cosine", "delete"]]
    return columns.assign(sae=label, **{scale: test.wide[f"atom/{scale}"] for scale in TESTED_SCALES})


def _verdict(gap: Estimate, row: pd.Series, base: pd.Series) -> Verdict:
    """The difference must hold, and so must the better dictionary's own substitution test."""
    for each in (row, base):
        if each["outcome"] == "below the floor":
            return Verdict("below the floor", f"{each['sae']}: {each['sentence']}")
    ahead = judge(gap, relevant=RELEVANT, what="the difference of win rates")
    if ahead.outcome != "holds":
        return ahead
    if row["outcome"] == "holds":
        return Verdict("holds", "It is ahead, and beats deletion and every control that beats deletion.")
    return Verdict(row["outcome"], f"It is ahead; of its own atoms against deletion: {row['sentence']}")


def _name(row: pd.Series) -> str:
    return f"{row['target'].replace('_', ' ')}s by {'mse' if row['loss'] == 'mse' else row['loss'] + ' loss'}"
