"""Which atoms point along the writes they fire on: the paper's partition into registers and bundles, with its nulls.

Source: WriteSAE (arXiv 2605.12770), section on the partition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import numpy as np
import pandas as pd
from pydantic import NonNegativeInt, PositiveInt

from writesae.page.format import number, percent
from writesae_study.dictionary.cosines import firing_cosines, first_component
from writesae_study.dictionary.kinds import ATOM_KINDS, KIND_RATES, alike, by_rule, compare_kinds
from writesae_study.evaluations.substitution import Substitution
from writesae_study.experiment.at_firings import OfAlive, wide_firings
from writesae_study.experiment.bench import Bench
from writesae_study.experiment.conditions import Rival
from writesae_study.experiment.draws import ALIVE_TOKENS
from writesae_study.experiment.evaluation import Result
from writesae_study.verdict import mixtures
from writesae_study.verdict.finding import Against, Claim, Finding, Paired, with_interval
from writesae_study.verdict.judge import Verdict, judge
from writesae_study.verdict.notation import points, signed

COSINE_SAMPLES: dict[str, str] = {"cosine": "atoms", "shuffled": "shuffled", "random": "random"}
"""Columns of the table `atoms` that hold medians of cosines, and the names of these samples in the other tables."""

STRONG = 10.0
"""Difference of BIC that counts as very strong evidence (Kass and Raftery, 1995)."""

APART = 2.0
"""Ashman's D, the distance of two means in units of the root mean square of the two standard deviations, from which on
two components are two kinds (Ashman, Bird and Zepf, 1994). One skewed kind is fitted by two that overlap."""

RELEVANT_COSINE = 0.05
"""Gain in cosine over shuffled positions from which on atoms point along their writes. It is the
cosine from which on the paper calls an atom a register."""

UNTRAINED = "an untrained dictionary at its own firings"
"""The null of every claim here, as a reader sees it."""

RELEVANT_REGISTERS = 0.1
"""Gain in the share of registers over shuffled positions that matters."""

RULES = ("Gated DeltaNet", "RWKV-7", "Mamba-2")
"""Update rules in the order of their registers' alignment, as the paper has it."""


class Lowest(NamedTuple):
    """The mixture of a sample with the lowest BIC."""

    components: int | None
    gap: float
    """By how much its BIC is lower than that of one component."""


@dataclass(frozen=True, kw_only=True)
class Partition(OfAlive):
    """For each alive atom, the median over its firings of the signed cosine cos(v_i, k_t) cos(w_i, u_t) between the
    atom and the native write. An atom is a **register** from 0.05 on and a **bundle** below. Whether there are two
    kinds at all is asked of Gaussian mixtures (1 to 4 components, BIC). Three nulls say what a dictionary without such
    atoms would show: `shuffled`, the writes of other positions of the same sequence; `random`, a random direction in
    the atom's place; and `untrained`, what as many random directions show where they fire, because an atom fires where
    its product with the write is large, learned or not.

    **Verdict of claim 6**, "atoms part into registers and bundles", by these rules in order:

    1. *not tested*: there are fewer than `min_atoms` alive atoms, or all cosines are alike.
    2. *fails*: on the cosines, BIC is lowest at another number of components than 2, or at 2 by less than 10 under
       that of one, or the two components overlap (Ashman's D below 2). A mixture also fits one kind that is skewed.
    3. *confounded*: the shuffled null, too, takes more than one component by at least 10, or the share of atoms at the
       threshold or above is no higher than in the shuffled null (by the ladder of `judge`, over atoms), or no higher
       than for an untrained dictionary at its own firings.
    4. *holds* otherwise.

    A claim of this project, "atoms point along the writes they fire on": the ladder of `judge` on the median over atoms
    of (cosine - shuffled), chance 0, a gain of 0.05 matters, against an untrained dictionary at its own firings
    (cosine - untrained).

    **Verdict of claim 4**, "register and bundle alike", from a substitution test of as many registers as bundles, each
    writing its own atom: the outcome is *below the floor*, *inconclusive*, *confounded* or *undecided* where that test
    is, or where `judge` finds so for one kind (its win rate against deletion over atoms, chance 1/2). It fails where a
    kind does not beat deletion. Else it holds where the 95% interval of the difference of the two rates lies within 10
    points of zero, fails where it excludes them, and is inconclusive where it reaches from one to the other: no
    difference found is no sameness shown.

    **Verdict of claim 26**, that atoms point along their writes and the first principal component of the head's writes
    (centered, of up to 1,024 writes of the same text) does not: the ladder of `judge` on the median over alive atoms
    of (cosine - pca), chance 0, a gain of 0.05 matters, against an untrained dictionary at its own firings. Registers
    alone would not do: they are those of a cosine of 0.05 and more. **Verdict of claim 27**, over results of several
    update rules: it holds where the cosines of the alive atoms fall from each rule to the next in the paper's order
    (Mann-Whitney tests, each with a one-sided p below 0.025), and those above shuffled positions (cosine - shuffled)
    fall too. It is confounded where only the cosines fall, and fails otherwise. A rule needs 20 alive atoms.
    """

    threshold: float = 0.05
    """Cosine from which on an atom is a register (the paper's operational rule)."""
    components: PositiveInt = 4
    """Largest mixture that is fitted."""
    restarts: PositiveInt = 3
    """Starts of each fit; the likeliest counts."""
    min_atoms: PositiveInt = 20
    """Alive atoms without which no claim is tested."""
    tested_atoms: NonNegativeInt = 16
    """Atoms of each kind whose substitution is tested, drawn uniformly (claim 4). 0: none."""
    firings_per_atom: PositiveInt = 4
    """Firings of each of these atoms."""
    controls: tuple[Rival, ...] = ("random", "state", "mean")
    """Controls of that test."""

    columns: ClassVar[dict[str, dict[str, str]]] = {
        "atoms": {
            "atom": "index of an alive atom",
            "firings": "firings that the medians are over",
            "cosine": "median cosine of the atom and the native write over the atom's firings",
            "shuffled": "the same with writes of other positions of the same sequence",
            "random": "the same firings with a random direction in the atom's place",
            "untrained": "the same tokens with what an untrained dictionary of as many atoms fires there",
            "kind": "register (cosine >= threshold) or bundle",
            "pca": "median cosine of the first principal component of the head's writes and the write, at the firings",
        },
        "mixtures": {
            "sample": "atoms, shuffled or random",
            "space": "cosine or z (Fisher's)",
            **mixtures.COLUMNS,
        },
        "substitution": KIND_RATES,
    }

    @property
    def substitution(self) -> Substitution:
        """The test of claim 4, without its atoms. The claim is about atoms of either kind and not about those that
        dominate a position, so that each firing's own atom is written."""
        return Substitution(
            atom_choice=("own",),
            firings_per_atom=self.firings_per_atom,
            scales=("coefficient",),
            controls=self.controls,
            seed=self.seed,
            rows_per_run=self.rows_per_run,
        )

    # -- measuring

    def measure(self, lab: Bench) -> dict[str, pd.DataFrame]:
        firings = lab.firings()
        alive = firings.alive(ALIVE_TOKENS, self.min_firings)
        ever = firings.alive(ALIVE_TOKENS)
        lab.require(
            len(alive) > 0,
            f"no atom is alive: {len(ever)} of {firings.n_atoms} fire, none of them {self.min_firings} times; "
            "give more tokens, or lower min_firings",
        )
        # A median for each alive atom, and of each null at the same firings.
        cosines = firing_cosines(lab, alive, directions={"pca": first_component(lab)})
        grouped = cosines.groupby("atom")[[*COSINE_SAMPLES, "untrained", "pca"]]
        atoms = grouped.median().assign(firings=grouped.size()).reset_index()
        kind = np.where(atoms["cosine"] >= self.threshold, *ATOM_KINDS)
        atoms = atoms.assign(kind=kind)
        lab.skipped[f"atoms that fire fewer than {self.min_firings} times"] += len(ever) - len(alive)
        by_kind = self._substitution_table(lab, atoms)
        # After the substitution test, which counts an atom as alive from its first firing on.
        lab.facts |= {"n_alive": len(atoms), "dead": firings.n_atoms - len(ever)}
        return {"atoms": atoms, "mixtures": self.mixture_table(atoms), "substitution": by_kind}

    def mixture_table(self, atoms: pd.DataFrame) -> pd.DataFrame:
        """Mixtures of each sample and space."""
        tables = []
        for column, sample in COSINE_SAMPLES.items():
            for space, values in {"cosine": atoms[column], "z": mixtures.fisher_z(atoms[column])}.items():
                fits = mixtures.fit_mixtures(values, self.components, restarts=self.restarts, seed=self.seed)
                tables.append(fits.assign(sample=sample, space=space))
        return pd.DataFrame(pd.concat(tables, ignore_index=True), columns=list(self.columns["mixtures"]))

    def _substitution_table(self, lab: Bench, atoms: pd.DataFrame) -> pd.DataFrame:
        """The table `substitution`, from up to `tested_atoms` of each kind that fire where they can be tested; empty
        where a kind has fewer than two."""
        firings = lab.firings()
        settings = self.substitution
        inside = firings.between(settings.first_position, firings.n_positions - settings.horizon - 1)
        testable = atoms[atoms["atom"].isin(firings.atom[inside])]  # hand-picked ones that never fire there would raise
        of_kinds = [testable.loc[testable["kind"] == kind, "atom"].to_numpy() for kind in ATOM_KINDS]
        if min(self.tested_atoms, *map(len, of_kinds)) < 2:
            return pd.DataFrame(columns=list(self.columns["substitution"]))
        # As many atoms of one kind as of the other.
        rng = lab.rng(4)
        drawn = [rng.choice(ids, min(len(ids), self.tested_atoms), replace=False) for ids in of_kinds]
        tested = np.sort(np.concatenate(drawn)).tolist()
        settings = replace(settings, atoms=tuple(tested))
        wide = wide_firings(Result(settings, {}, settings.measure(lab)))
        verdict = settings.nearer(wide, settings.scales[0]).verdict
        table, lab.facts["compared"] = compare_kinds(wide, settings.scales[0], verdict, atoms, self.seed)
        return table

    # -- judging

    def findings(self, result: Result) -> list[Finding]:
        """Claims 6, 4 and 26, and whether atoms point along their writes."""
        table = result.tables["atoms"]
        atoms = Paired(table, ("atom",), self.seed)
        gain = atoms.median("cosine", "shuffled")
        too_few = Verdict("not tested", f"{len(table)} alive atoms are too few.")
        aligned = Finding(
            claim="atoms point along the writes they fire on",
            effect=gain,
            what="the median gain in cosine over shuffled positions",
            null=UNTRAINED,
            against={UNTRAINED: Against(atoms.median("cosine", "untrained"))},
            relevant=RELEVANT_COSINE,
            ruled=too_few if len(table) < self.min_atoms else None,
            shown={
                "atoms": atoms.median("cosine"),
                "shuffled null": atoms.median("shuffled"),
                UNTRAINED: atoms.median("untrained"),
                "random null": atoms.median("random"),
            },
            write="{:.3f}".format,
            axis="median cosine",
            measured=f"{with_interval(gain, signed)} over shuffled positions",
            of="alive atoms",
        )
        lead = atoms.median("cosine", "pca")
        pca = replace(
            aligned,
            number=26,
            claim="atoms point along their writes, the first principal component of writes does not",
            effect=lead,
            what="the median lead of atoms over the component",
            shown={"lead of atoms": lead, f"lead of {UNTRAINED}": atoms.median("untrained", "pca")},
            write=signed,
            axis="median cosine above that of the first principal component at the same firings",
            measured="",
        )
        return [self._two_kinds(result), aligned, alike(result, self.controls), pca]

    @classmethod
    def across(cls, results: list[Result]) -> list[tuple[str, Claim]]:
        """Claim 27, over all results of the rules that the paper orders, dictionaries of writes."""
        of_writes = [result for result in results if result.info["target"] == "write"]
        tables = {}
        for rule in RULES:
            parts = [result.tables["atoms"] for result in of_writes if result.info["rule"] == rule]
            if parts:
                tables[rule] = pd.concat(parts, ignore_index=True)
        return [(", ".join(tables), by_rule(tables).row())] if len(tables) > 1 else []

    def _two_kinds(self, result: Result) -> Finding:
        """Claim 6, with what the nulls show."""
        atoms = result.tables["atoms"]
        fitted = _lowest_bic(result.tables["mixtures"])
        registers = atoms[atoms["kind"] == "register"]
        above = atoms[[*COSINE_SAMPLES, "untrained"]].ge(self.threshold).astype(float).assign(atom=atoms["atom"])
        counts = f"{len(registers)} register / {len(atoms) - len(registers)} bundle / {result.info['dead']} dead"
        median = number(float(registers["cosine"].median()))
        share = percent(float(registers["firings"].sum() / atoms["firings"].sum()))
        controls = []
        for null in ("shuffled", "random"):
            best = fitted[null, "cosine"].components if (null, "cosine") in fitted else "nothing"
            share_above = percent(above[null].mean())
            controls.append(f"{null} null: {share_above} at {self.threshold:g} or above, BIC prefers {best}")
        return Finding(
            number=6,
            claim="atoms part into registers and bundles",
            null=UNTRAINED,
            ruled=self._kinds_verdict(result, above, fitted),
            measured=f"{counts}; register median cosine {median}; registers make {share} of firings",
            controls="; ".join(controls),
            n=len(atoms),
            of="alive atoms",
        )

    def _kinds_verdict(self, result: Result, above: pd.DataFrame, fitted: Mapping[object, Lowest]) -> Verdict:
        """The verdict of claim 6: the rules of the class's docstring, in order.

        Args:
            above: whether each atom reaches the threshold, in each sample.
        """
        nothing = Lowest(None, 0.0)
        # What BIC prefers, and by how much over one component: of atoms, of the shuffled null, on Fisher's z.
        best, gap = fitted.get(("atoms", "cosine"), nothing)
        null, null_gap = fitted.get(("shuffled", "cosine"), nothing)
        on_z, _ = fitted.get(("atoms", "z"), nothing)
        fits = result.tables["mixtures"]
        two = fits[(fits["sample"] == "atoms") & (fits["space"] == "cosine") & (fits["components"] == 2)]
        apart = 0.0
        if len(two):
            apart = float(np.ptp(two["mean"]) / np.sqrt((two["sd"] ** 2).mean()))  # Ashman's D
        # The share of registers, against shuffled positions and an untrained dictionary.
        shares = Paired(above, ("atom",), self.seed)
        excess = shares.mean("cosine", "shuffled")
        rival = {UNTRAINED: Against(shares.mean("cosine", "untrained"))}
        ladder = judge(
            excess, rival, relevant=RELEVANT_REGISTERS, what="the share of registers beyond that at shuffled positions"
        )
        difference = f"[{points(excess.low)}, {points(excess.high)}] points"
        share = f"{percent(above['cosine'].mean())} of atoms reach {self.threshold:g}"
        fit = f"BIC prefers {best} components on the cosine (by {gap:.0f} over one) and {on_z} on Fisher's z"
        if apart:
            fit += f"; two are {apart:.1f} standard deviations apart"
        # The rules of the docstring, in order.
        if len(above) < self.min_atoms or best is None:
            return Verdict("not tested", f"{len(above)} alive atoms are too few, or too alike, to have kinds.")
        if best != 2 or gap < STRONG or apart < APART:
            return Verdict("fails", f"{fit}, so the cosine does not part the atoms into two kinds; {share}.")
        if null_gap >= STRONG:
            return Verdict(
                "confounded",
                f"{fit}, but at shuffled positions, where nothing can point along its write, it prefers {null}: a "
                "mixture fits what is not normal, and shows no kinds.",
            )
        if ladder.outcome == "fails":
            return Verdict(
                "confounded", f"{fit}, but shuffled positions give as many registers (difference {difference})."
            )
        if ladder.outcome == "holds":
            return Verdict("holds", f"{fit}; {share}, {difference} more than at shuffled positions.")
        return ladder


def _lowest_bic(fits: pd.DataFrame) -> dict[object, Lowest]:
    """Of each sample in each space (a key is both), the mixture that BIC prefers."""
    lowest = {}
    for key, bic in fits.set_index("components").groupby(["sample", "space"])["bic"]:
        gap = float(bic.iloc[0] - bic.min())  # the first row is that of one component
        lowest[key] = Lowest(int(str(bic.idxmin())), gap)
    return lowest
