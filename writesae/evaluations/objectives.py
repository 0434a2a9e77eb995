"""Objectives: dictionaries of one head that were trained for different things, side by side.

The authors of WriteSAE (arXiv 2605.12770) train on states and name a write-aligned loss as what their failures on
larger models lack. An objective here is a target (write, state, last_state) and a loss (`sae.losses.Loss`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from writesae.choices import AtLeast
from writesae.dictionary.reconstruction import reconstruction
from writesae.dictionary.traits import objective
from writesae.evaluations.substitution import Substitution
from writesae.experiment.at_firings import OfAlive, wide_firings
from writesae.experiment.conditions import Control
from writesae.experiment.evaluation import Result, Scope, described
from writesae.experiment.lab import Lab
from writesae.verdict.finding import Finding, Paired, said
from writesae.verdict.format import percent, points
from writesae.verdict.judge import Verdict
from writesae.verdict.names import NAMES
from writesae.verdict.statistics import Estimate

TestedScale = Literal["coefficient", "matched"]
TESTED_SCALES: tuple[TestedScale, ...] = get_args(TestedScale)
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
RELEVANT = 0.1
"""Difference of two win rates from which on it matters."""


class Tested(NamedTuple):
    """The substitution test of one dictionary."""

    firings: pd.DataFrame
    """As `wide_firings` gives them."""
    n_alive: int
    """Its alive atoms."""


@dataclass(frozen=True, kw_only=True)
class Objectives(OfAlive):
    """Dictionaries of one head that differ in what they were trained for.

    Measured for each: the share of variance explained and the share of reads explained (both of the dictionary's own
    target, so that these are compared within a target only); the share of alive atoms; the signed cosine of atom and
    native write at tested firings; and the substitution win rate, the share of tested firings at which the atom is
    nearer to the native model than deletion, at the dictionary's own coefficient and at the norm of the native write.

    Differences have intervals by a bootstrap: over sequences, paired, for reconstruction; over atoms for all others.

    **Verdict** of "training on X substitutes better than training on states by mse", one claim for each other
    objective. It is "not tested" without a dictionary of states by mse, and below the floor where the substitution test
    of either dictionary is. Otherwise the ladder of `judge` on the difference of win rates (10 points matter), then the
    outcome of X's own substitution test (claim 1): X must also beat deletion, and every control that beats deletion.
    """

    reconstruction_sequences: Annotated[int, AtLeast(2)] = 16
    """Sequences whose reconstruction is measured."""
    n_atoms: Annotated[int, AtLeast(2)] = 40  # intervals are over atoms
    """Atoms of each dictionary in the substitution test, drawn uniformly from the alive ones."""
    firings_per_atom: int = 3
    """Firings of each of these atoms."""
    scale: TestedScale = "coefficient"
    """Scale that the claims are about, coefficient or matched. Both are measured: the coefficient of a dictionary of
    states is in units of states, so that its atoms can lose by their size alone."""
    controls: tuple[Control, ...] = ("random", "state")
    """Controls of the substitution test."""
    horizon: int = 16
    """KL is averaged over t..t+horizon, both included."""

    question: ClassVar[str] = "What should a dictionary be trained for?"
    scope: ClassVar[Scope] = Scope.TARGETS
    columns: ClassVar[dict[str, dict[str, str]]] = {
        "dictionaries": described(
            "sae",
            target="what it was trained on: write, state or last_state",
            loss="loss that it was trained by: mse, reads or write",
            d_sae="number of atoms",
            l0="active atoms per token",
            tested_atoms="number of atoms in the substitution test",
            outcome="outcome of its substitution test",
            unbeaten="controls that its atoms are not shown to beat; empty if none",
            sentence="why the outcome is what it is",
        ),
        "measures": {
            **described("sae"),
            "measure": "explained, reads, alive, cosine; win rates: coefficient, matched, or name of a control",
            "value": "mean: a share, or a cosine",
            **described("low high"),
            "n": "number of observations",
            "clusters": "number of independent units",
            "unit": "what the independent units are",
        },
        "contrasts": {
            "measure": ", ".join(MEASURES),
            "a": "label of one dictionary",
            "b": "label of another that it can be compared with",
            "difference": "mean of a minus mean of b",
            **described("low high"),
        },
        "firings": described(
            "sae sequence position atom",
            cosine="signed cosine of the written atom and the native write",
            delete="KL in nats after deletion of the write",
            coefficient="KL in nats with the atom in its place, at the dictionary's own coefficient",
            matched="KL in nats with the atom in its place, at the norm of the native write",
        ),
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
        tests: dict[str, Tested] = {}
        test = self.substitution()
        for label in lab.saes:
            view = lab.only(label)  # facts follow the dictionary: each has another number of alive atoms
            wide = wide_firings(Result(test, {}, test.measure(view)))
            lab.require(
                wide["written_atom"].nunique() > 1,
                f"{label}: only one atom can be tested, and an interval needs two; give more tokens",
            )
            tests[label] = Tested(wide, int(str(view.facts["n_alive"])))
        l0 = fits.groupby("sae")["l0"].mean()
        rows = []
        for label, sae in lab.saes.items():
            row = {"sae": label, **objective(sae)._asdict(), "d_sae": int(sae.cfg.d_sae), "l0": l0[label]}
            rows.append(row)
        dictionaries = pd.DataFrame(rows)
        lab.facts["target"] = ", ".join(dictionaries["target"].unique())
        return self.tables(dictionaries, tests, fits)

    def tables(
        self, dictionaries: pd.DataFrame, tests: Mapping[str, Tested], fits: pd.DataFrame
    ) -> dict[str, pd.DataFrame]:
        """All tables: verdicts, means, and what is ahead of what.

        Args:
            tests: by label.
            fits: as `reconstruction` gives them.
        """
        samples: dict[str, dict[str, Paired]] = {}
        verdicts, firings = [], []
        scales = {f"atom/{scale}": scale for scale in TESTED_SCALES}
        for label, d_sae in zip(dictionaries["sae"], dictionaries["d_sae"]):
            wide, n_alive = tests[label]
            is_alive = np.arange(d_sae) < n_alive  # intervals resample atoms, and only their number is known
            samples[label] = self._samples(wide, fits[fits["sae"] == label], is_alive)
            verdict = self.substitution().nearer(wide, self.scale).verdict
            row = {
                "tested_atoms": wide["written_atom"].nunique(),
                "outcome": verdict.outcome,
                "unbeaten": ", ".join(verdict.unbeaten_controls),
                "sentence": verdict.sentence,
            }
            verdicts.append(row)
            firings.append(wide.assign(sae=label).rename(columns=scales))
        measures = []
        for names in (MEASURES, self.controls):
            for label, name in itertools.product(samples, names):
                unit = "sequences" if name in WITHIN_TARGET else "atoms"
                measures.append((label, name, *samples[label][name].mean(name), unit))
        contrasts = _contrasts(samples, dictionaries.set_index("sae")["target"])
        return {
            "dictionaries": dictionaries.join(pd.DataFrame(verdicts)),
            "measures": pd.DataFrame(measures, columns=list(self.columns["measures"])),
            "contrasts": pd.DataFrame(contrasts, columns=list(self.columns["contrasts"])),
            "firings": pd.concat(firings, ignore_index=True),
        }

    def _samples(self, wide: pd.DataFrame, fits: pd.DataFrame, alive: NDArray[np.bool_]) -> dict[str, Paired]:
        """What each measure of one dictionary is a mean of."""
        rates = {scale: f"atom/{scale}" for scale in TESTED_SCALES}
        rates |= {control: f"{control}/{self.scale}" for control in self.controls}
        wins = pd.DataFrame({name: wide[column] < wide["delete"] for name, column in rates.items()})
        # Rates are to hold for the dictionary's atoms, so that these are the units.
        of_firings = wins.assign(cosine=wide["cosine"], atom=wide["written_atom"])
        of_atoms = Paired(of_firings, ("atom",), self.seed)
        of_sequences = Paired(fits.reset_index(drop=True), seed=self.seed)
        every_atom = pd.DataFrame({"alive": alive}).reset_index(names="atom")
        return {
            **dict.fromkeys(("cosine", *rates), of_atoms),
            **dict.fromkeys(WITHIN_TARGET, of_sequences),
            "alive": Paired(every_atom, ("atom",), self.seed),
        }

    # -- judging

    def findings(self, result: Result) -> list[Finding]:
        """Each objective against states by mse."""
        table = result.tables["dictionaries"].set_index("sae", drop=False)
        base = table[(table["target"] == "state") & (table["loss"] == "mse")]
        if base.empty:
            claim = "another objective substitutes better"
            return [Finding.untested(claim, "It needs a dictionary trained on states by mse.")]
        rivals = [table.loc[label] for label in table.index if label != base.index[0]]
        return [self._better(result, rival, base.iloc[0]) for rival in rivals]

    def _better(self, result: Result, row: pd.Series, base: pd.Series) -> Finding:
        """The difference must hold, and so must the better dictionary's own substitution test."""
        a = str(row["sae"])
        b = str(base["sae"])
        mine = value(result, a, self.scale)
        theirs = value(result, b, self.scale)
        contrasts = result.tables["contrasts"]
        is_pair = (contrasts[["measure", "a", "b"]] == [self.scale, a, b]).all(axis=1)
        pair = contrasts[is_pair].iloc[0]
        n = mine.n + theirs.n
        gap = Estimate(pair["difference"], pair["low"], pair["high"], n, min(mine.n_clusters, theirs.n_clusters))
        floor = None
        for tested in (base, row):
            if tested["outcome"] == "below the floor":
                floor = Verdict("below the floor", f"{tested['sae']}: {tested['sentence']}")
        sure = "It is ahead, and beats deletion and every control that beats deletion."
        short = f"It is ahead; its atoms compared with deletion: {row['sentence']}"
        loss = "mse" if row["loss"] == "mse" else f"{row['loss']} loss"
        name = f"{row['target'].replace('_', ' ')}s by {loss}"
        return Finding(
            claim=f"training on {name} ({a}) substitutes better than training on states by mse",
            effect=gap,
            what="the difference of win rates",
            relevant=RELEVANT,
            null="a dictionary trained on states by mse",
            unless=Verdict(row["outcome"], sure if row["outcome"] == "holds" else short),
            ruled=floor,
            shown={a: mine, b: theirs} | {f"{NAMES[c]}, {a}": value(result, a, c) for c in self.controls},
            write=percent,
            axis="of firings nearer to the native model than after deletion",
            measured=f"difference {said(gap, points)} points",
            of=f"firings of {mine.n_clusters + theirs.n_clusters} atoms",
        )


def _contrasts(samples: Mapping[str, Mapping[str, Paired]], target: pd.Series) -> list[tuple[object, ...]]:
    """Rows of the table `contrasts`: each measure, each ordered pair of dictionaries that it can compare."""
    contrasts = []
    for name, (a, b) in itertools.product(MEASURES, itertools.permutations(samples, 2)):
        first = samples[a][name]
        second = samples[b][name]
        if name not in WITHIN_TARGET:
            contrasts.append((name, a, b, *first.lead(name, second)[:3]))
        elif target[a] == target[b]:  # the same sequences, in the same order
            contrasts.append((name, a, b, *first.mean(first[name] - second[name])[:3]))
    return contrasts


def value(result: Result, sae: str, measure: str) -> Estimate:
    """One measure of one dictionary."""
    table = result.tables["measures"]
    row = table[(table["sae"] == sae) & (table["measure"] == measure)].iloc[0]
    return Estimate(row["value"], row["low"], row["high"], int(row["n"]), int(row["clusters"]))
