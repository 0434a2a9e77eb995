"""Seeds: what dictionaries that differ in their seed have in common, in numbers of atoms and atom by atom.

Source: WriteSAE (arXiv 2605.12770), which reports counts that vary by 4-12% and fewer than 1% of atoms that match at
cosine > 0.9. A matched cosine means nothing by itself, since the best of 2,048 partners is always somewhat alike, so
two nulls are matched in the same way.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment

from writesae.dictionary.estimates import Estimate
from writesae.experiment.firings import Integers
from writesae.page.format import percent
from writesae_study.dictionary.cosines import firing_cosines
from writesae_study.experiment.at_firings import OfAlive
from writesae_study.experiment.bench import Bench
from writesae_study.experiment.draws import ALIVE_TOKENS
from writesae_study.experiment.evaluation import Result, Scope
from writesae_study.head.writes import torch_generator
from writesae_study.verdict.finding import Finding, Paired, with_interval
from writesae_study.verdict.judge import Verdict, judge, too_little
from writesae_study.verdict.notation import signed

SAMPLES: dict[str, str] = {
    "atoms": "alive atoms of the two dictionaries",
    "random": "as many Gaussian directions on either side",
    "writes": "as many native writes on either side, of different sequences",
}
"""What is matched: the dictionaries and the two nulls."""
RELEVANT = 0.05
"""Difference of matched |cosines| that matters, and margin by which a null may be worse and still count as equal."""
SAME, SAME_SHARE, SPREAD = 0.9, 0.01, 0.12
"""The paper's: |cosine| above which two atoms are the same; share of matched atoms up to which atoms are not the same;
spread of a count over seeds, (largest - smallest) / mean, up to which kinds are the same."""


@dataclass(frozen=True, kw_only=True)
class Seeds(OfAlive):
    """The dictionaries differ in their seed only. Their alive atoms are matched one to one, so that the sum of
    |cosines| is largest. Two nulls are matched in the same way: as many Gaussian directions, and as many native writes
    drawn at random from different sequences. Atoms and nulls are not paired, so the excess over a null is the
    difference of two means, with an interval by a bootstrap over the pairs of each sample.

    **Verdict** of claim 20, "seeds find the same kinds, not the same atoms": it *fails* where the numbers of alive
    atoms or of registers spread by more than 12% of their mean, or more than 1% of the matched atoms of some pair of
    dictionaries exceed cosine 0.9. Atoms that were never learned share nothing either, so it *holds* only where in
    every pair of dictionaries the atoms match better than random directions by more than 0.1; otherwise it is
    *inconclusive*. (Half of that will not do: random atoms that fire are a little more alike than random directions.)
    "More than 0.1" is the ladder of `judge` on the excess over random directions, in the pair where it is smallest.
    """

    threshold: float = 0.05
    """Median cosine with the native write from which on an atom is a register."""

    scope: ClassVar[Scope] = Scope.SEEDS
    columns: ClassVar[dict[str, dict[str, str]]] = {
        "counts": {
            "sae": "label of the dictionary",
            "alive": "number of atoms that fire at least min_firings times",
            "register": "number of these with a median cosine at the threshold or above",
        },
        "matches": {
            "a": "label of one dictionary",
            "b": "label of the other",
            "sample": "; ".join(f"{name}: {meaning}" for name, meaning in SAMPLES.items()),
            "n": "number of matched pairs",
            "share_same": "share of pairs with a |cosine| above 0.9",
            "excess": "mean matched |cosine| of the atoms minus that of this sample",
            "excess_low": "lower end of its 95% interval over pairs",
            "excess_high": "upper end of its 95% interval over pairs",
        },
        "pairs": {
            "a": "label of one dictionary",
            "b": "label of the other",
            "sample": "atoms, random or writes",
            "first": "atom of a (a running number in the nulls)",
            "second": "its partner in b",
            "cosine": "|cosine| of the two",
        },
    }

    # -- measuring

    def measure(self, lab: Bench) -> dict[str, pd.DataFrame]:
        numbers: dict[str, Integers] = {}
        counts = []
        # How many atoms of each dictionary are alive, and how many of these are registers.
        for label in lab.saes:
            firings = lab.firings(label)
            alive = firings.alive(ALIVE_TOKENS, self.min_firings)
            numbers[label] = alive
            lab.require(len(alive) > 0, f"{label} has no atom that fires {self.min_firings} times")
            medians = firing_cosines(lab, alive, label).groupby("atom")["cosine"].median()
            counts.append((label, len(alive), int((medians >= self.threshold).sum())))
        # Native writes for the second null, as many as the larger dictionary has alive atoms.
        pools = []
        most = max(map(len, numbers.values()))
        needed = math.ceil(most / lab.tokens.shape[1]) + 1  # one more: some writes are zero
        for start in (0, 1):  # even and odd sequences: the same write on both sides would match itself
            writes = lab.native_writes(range(start, len(lab.tokens), 2)[:needed])
            pools.append(writes.rows(writes.norm() > 0))
        rng = np.random.default_rng(self.seed)
        pairs = []
        for a, b in itertools.combinations(lab.saes, 2):
            # The three samples of a pair: atoms, random directions of their ranks, native writes.
            atoms = [lab.atoms(numbers[label], label) for label in (a, b)]
            noise = torch_generator(rng)
            random = [alive.random_like(noise) for alive in atoms]
            writes = []
            for pool, alive in zip(pools, atoms):
                drawn = rng.permutation(len(pool))[: len(alive)]
                writes.append(pool.rows(torch.tensor(drawn)))
            for sample, (of_a, of_b) in zip(SAMPLES, (atoms, random, writes)):
                # One partner for each, so that the sum of |cosines| is largest.
                size = of_a.cosines(of_b).abs().cpu().double().numpy()
                first, second = linear_sum_assignment(size, maximize=True)  # the Hungarian method
                cosine = size[first, second]
                if sample == "atoms":
                    first = numbers[a][first]
                    second = numbers[b][second]
                columns = {"a": a, "b": b, "sample": sample, "first": first, "second": second, "cosine": cosine}
                pairs.append(pd.DataFrame(columns))
        table = pd.concat(pairs, ignore_index=True)
        return {
            "counts": pd.DataFrame(counts, columns=list(self.columns["counts"])),
            "matches": self.summary(table),
            "pairs": table,
        }

    def summary(self, pairs: pd.DataFrame) -> pd.DataFrame:
        """The table `matches` of a table `pairs`."""
        rows = []
        for (a, b), of_pair in pairs.groupby(["a", "b"], sort=False):
            by_sample = of_pair.groupby("sample")
            # Atoms and nulls are not paired, so that each sample has its own units.
            samples = {name: Paired(rows.reset_index(), ("index",), self.seed) for name, rows in by_sample}
            for sample in SAMPLES:
                cosines = samples[sample]["cosine"]
                excess = samples["atoms"].lead("cosine", samples[sample])
                is_same = cosines > SAME
                rows.append((a, b, sample, len(cosines), is_same.mean(), *excess[:3]))
        return pd.DataFrame(rows, columns=list(self.columns["matches"]))

    # -- judging

    def findings(self, result: Result) -> list[Finding]:
        """Claim 20, with whether atoms match beyond chance."""
        counts = result.tables["counts"]
        spread = {}
        for name in ("alive", "register"):
            spread[name] = float(np.ptp(counts[name]) / max(counts[name].mean(), 1))
        by_sample = result.tables["matches"].groupby("sample")
        same = {name: float(rows["share_same"].max()) for name, rows in by_sample}
        # What alone makes the claim fail: counts that vary, or atoms that are the same.
        faults = []
        if max(spread.values()) > SPREAD:
            faults.append(f"counts vary by more than {percent(SPREAD)}")
        if same["atoms"] > SAME_SHARE:
            faults.append(f"more than {percent(SAME_SHARE)} of atoms are the same")
        matches = result.tables["matches"].groupby("sample").get_group("random")
        # By the lower end: of all pairs the excess has to be there in the one that shows it least.
        least = matches.nsmallest(1, "excess_low").iloc[0]
        n = int(matches["n"].min())
        excess = Estimate(least["excess"], least["excess_low"], least["excess_high"], n, n)
        # Whether anything was learned: atoms match beyond chance in the pair that shows it least.
        what = f"the excess over random directions of {least['a']} and {least['b']}, the pair that matches worst,"
        learned = judge(excess, chance=RELEVANT, relevant=RELEVANT, what=what)  # atoms that fire are alike by a little
        few = too_little(excess)
        if few is not None:
            verdict = Verdict("inconclusive", few)
        elif faults:
            verdict = Verdict("fails", f"{' and '.join(faults).capitalize()}.")
        elif learned.outcome == "holds":
            verdict = Verdict("holds", "Counts agree, and atoms do not.")
        else:
            verdict = Verdict("inconclusive", f"Nothing shows that anything was learned. {learned.sentence}")
        measured = [
            f"alive vary by {percent(spread['alive'])}, registers by {percent(spread['register'])}",
            f"at most {percent(same['atoms'])} of atoms match at cosine > {SAME:g}",
            f"mean |cosine| {with_interval(excess, signed)} above random directions",
        ]
        same_kinds = Finding(
            number=20,
            claim="seeds find the same kinds, not the same atoms",
            null="random directions",
            ruled=verdict,
            measured="; ".join(measured),
            controls=f"random match {percent(same['random'])}, writes match {percent(same['writes'])}",
            n=len(counts),
            of="seeds",
        )
        return [same_kinds]
