"""Two kinds of atoms: what a partition asks of registers and bundles, from tables alone.

Do both substitute alike, and does the alignment of registers fall from one update rule to the next?
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import cast

import pandas as pd
from scipy.stats import mannwhitneyu

from writesae.dictionary.estimates import Estimate
from writesae.files import Json
from writesae.page.format import number, percent
from writesae_study.experiment.at_firings import RELEVANT_RATE
from writesae_study.experiment.evaluation import Result, described
from writesae_study.verdict import statistics as stats
from writesae_study.verdict.finding import Finding, Paired
from writesae_study.verdict.judge import MIN_OBSERVATIONS, Verdict, judge
from writesae_study.verdict.notation import points
from writesae_study.verdict.paper import Outcome

ATOM_KINDS = ("register", "bundle")
KIND_RATES: dict[str, str] = {
    "kind": "register or bundle",
    "rate": "share of firings on which the atom is nearer to native than deletion",
    **described("low high"),
    "n": "firings",
    "n_atoms": "atoms",
}
"""Columns of the table of `compare_kinds`."""


def compare_kinds(
    wide: pd.DataFrame, scale: str, verdict: Verdict, atoms: pd.DataFrame, seed: int
) -> tuple[pd.DataFrame, dict[str, Json]]:
    """Register against bundle in a substitution test of two or more atoms of each.

    Args:
        wide: firings of a substitution test of some of `atoms` (`wide_firings`).
        scale: at which the atoms were written.
        verdict: that of the whole test.
        atoms: the table `atoms` of a partition.

    Returns: the table `substitution`, and the verdict of the test with the difference of the kinds.
    """
    # Whether each firing wins against deletion, by the kind of its atom.
    wins = wide[["written_atom"]].assign(win=wide[f"atom/{scale}"] < wide["delete"])
    wins = wins.join(atoms.set_index("atom")["kind"], on="written_atom", how="inner")
    by_kind = {kind: Paired(wins[wins["kind"] == kind], ("written_atom",), seed) for kind in ATOM_KINDS}
    rows = [(kind, *paired.mean("win")) for kind, paired in by_kind.items()]
    register = by_kind["register"]
    bundle = by_kind["bundle"]
    gap = register.lead("win", bundle)
    p_value = stats.permutation_test(
        register["win"], bundle["win"], register["written_atom"], bundle["written_atom"], seed=seed
    )
    facts: dict[str, Json] = {
        "verdict": {"outcome": verdict.outcome, "sentence": verdict.sentence},
        "difference": {"mean": gap.mean, "low": gap.low, "high": gap.high, "p_value": p_value},
    }
    return pd.DataFrame(rows, columns=list(KIND_RATES)), facts


def alike(result: Result, controls: Sequence[str]) -> Finding:
    """Claim 4: both kinds beat deletion, and the interval of their difference lies within 10 points of zero. A test
    that is stopped, as a whole or for one kind, stops the claim."""
    claim = "register and bundle atoms substitute alike"
    table = result.tables["substitution"]
    if table.empty:
        counts = result.tables["atoms"]["kind"].value_counts()
        listed = " and ".join(f"{counts.get(kind, 0)} {kind}" for kind in ATOM_KINDS)
        return Finding.untested(
            claim, f"It needs two tested atoms of each kind; of the alive atoms there are {listed}.", 4, "firings"
        )
    compared = cast(Mapping[str, Mapping[str, float]], result.info["compared"])
    gap = compared["difference"]
    test = cast(Mapping[str, str], compared["verdict"])
    rates = {}
    for row in table.to_dict("records"):
        rates[str(row["kind"])] = Estimate(row["rate"], row["low"], row["high"], row["n"], row["n_atoms"])
    interval = f"[{points(gap['low'])}, {points(gap['high'])}] points"
    of_test = Verdict(cast(Outcome, test["outcome"]), test["sentence"])
    verdict = _alike_verdict(of_test, rates, gap, interval)
    atoms = ", ".join(f"{rate.n_clusters} {kind} atoms" for kind, rate in rates.items())
    return Finding(
        number=4,
        claim=claim,
        null=f"two kinds that differ by {percent(RELEVANT_RATE)}",
        ruled=verdict,
        chance=0.5,
        shown=rates,
        write=percent,
        axis="of firings nearer to the native model than after deletion",
        measured=f"{atoms}; difference {interval}, p = {gap['p_value']:.2g}",
        controls=f"those of the substitution test: {', '.join(controls)}",
        n=int(table["n"].sum()),
        of="firings, by atom",
    )


def _alike_verdict(test: Verdict, rates: Mapping[str, Estimate], gap: Mapping[str, float], interval: str) -> Verdict:
    """Whether both kinds beat deletion alike.

    Args:
        test: verdict of the whole substitution test.
        rates: win rate against deletion, by kind.
        gap: difference of the rates, with its interval, which `interval` has in words.
    """
    of_kinds = {}
    for kind, rate in rates.items():
        what = f"the win rate of {kind} atoms against deletion"
        of_kinds[kind] = judge(rate, chance=0.5, relevant=RELEVANT_RATE, what=what)
    # The worst outcome first: a test that cannot be believed as a whole says nothing of its kinds.
    for outcome in ("below the floor", "inconclusive", "confounded", "undecided"):
        for verdict in (test, *of_kinds.values()):
            if verdict.outcome == outcome:
                return verdict
    failed = [kind for kind, verdict in of_kinds.items() if verdict.outcome == "fails"]
    if failed:
        return Verdict("fails", f"Deletion is not beaten by {' and '.join(failed)} atoms.")
    if gap["low"] >= -RELEVANT_RATE and gap["high"] <= RELEVANT_RATE:
        return Verdict("holds", f"Both kinds beat deletion, and differ by no more than {percent(RELEVANT_RATE)}.")
    if gap["low"] > RELEVANT_RATE or gap["high"] < -RELEVANT_RATE:
        return Verdict(
            "fails", f"Both kinds beat deletion, but not alike: they differ by more than {percent(RELEVANT_RATE)}."
        )
    return Verdict(
        "inconclusive",
        f"Both kinds beat deletion, but their difference {interval} shows neither sameness nor a difference of "
        f"{percent(RELEVANT_RATE)}.",
    )


def by_rule(tables: Mapping[str, pd.DataFrame]) -> Finding:
    """Claim 27 from the tables `atoms` of several rules, in the paper's order."""
    atoms = {rule: table.assign(excess=table["cosine"] - table["shuffled"]) for rule, table in tables.items()}

    def p_values(column: str) -> dict[str, float]:
        tests = {}
        for higher, lower in itertools.pairwise(atoms):
            test = mannwhitneyu(atoms[higher][column], atoms[lower][column], alternative="greater")
            tests[f"{higher} > {lower}"] = float(test.pvalue)
        return tests

    def medians(column: str) -> str:
        words = []
        for rule, table in atoms.items():
            of_registers = table.loc[table["kind"] == "register", column]
            words.append(f"{rule} {number(float(of_registers.median()))}")
        return ", ".join(words)

    # From each rule to the next: first the cosines, then what of them is above shuffled positions.
    of_cosines = p_values("cosine")
    tests = ", ".join(f"{pair} p = {p:.2g}" for pair, p in of_cosines.items())
    cosines_fall = max(of_cosines.values()) < 0.025
    if min(map(len, atoms.values())) < MIN_OBSERVATIONS:
        verdict = Verdict("inconclusive", f"Too little data: every rule needs {MIN_OBSERVATIONS} alive atoms.")
    elif not cosines_fall:
        verdict = Verdict("fails", "The cosines do not fall from each rule to the next.")
    elif max(p_values("excess").values()) < 0.025:
        verdict = Verdict(
            "holds", "The cosines fall from each rule to the next, above those at shuffled positions too."
        )
    else:
        verdict = Verdict("confounded", "Above the cosines at shuffled positions, those of atoms do not fall.")
    return Finding(
        number=27,
        claim="alignment of registers falls with the rank of the write rule",
        null="shuffled positions",
        ruled=verdict,
        measured=f"median cosine of registers: {medians('cosine')}; Mann-Whitney tests of all alive atoms: {tests}",
        controls=f"at shuffled positions: {medians('shuffled')}",
        n=sum(map(len, tables.values())),
        of="alive atoms",
    )
