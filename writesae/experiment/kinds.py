"""Two kinds of atoms: what a partition asks of registers and bundles, from tables alone.

Do both substitute alike, and does the alignment of registers fall from one update rule to the next?
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import pandas as pd
from scipy.stats import ks_2samp

from writesae.experiment.at_firings import RELEVANT
from writesae.experiment.evaluation import Result, described
from writesae.files import Json
from writesae.verdict import statistics as stats
from writesae.verdict.finding import Finding, Paired
from writesae.verdict.format import percent, points
from writesae.verdict.judge import Verdict, judge
from writesae.verdict.paper import Outcome
from writesae.verdict.statistics import Estimate

KINDS = ("register", "bundle")
KIND_RATES: dict[str, str] = {
    "scale": "scale of the substitution test",
    "kind": "register or bundle",
    "rate": "share of firings on which the atom is nearer to native than deletion",
    **described("low high"),
    "n": "firings",
    "n_atoms": "atoms",
    "by_firings": "the rate with each atom weighted by how often it fires on the text",
}
"""Columns of the table of `compare_kinds`."""


def compare_kinds(
    wide: pd.DataFrame, scale: str, verdict: Verdict, atoms: pd.DataFrame, seed: int
) -> tuple[pd.DataFrame, dict[str, Json]]:
    """Register against bundle in a substitution test.

    Args:
        wide: firings of a substitution test of some of `atoms` (`wide_firings`).
        scale: at which the atoms were written.
        verdict: that of the whole test.
        atoms: the table `atoms` of a partition.

    Returns: the table `substitution`, and the verdict of the test with the difference of the kinds.
    """
    known = atoms.set_index("atom")[["kind", "firings"]]
    wins = wide[["written_atom"]].assign(win=wide[f"atom/{scale}"] < wide["delete"])
    wins = wins.join(known, on="written_atom", how="inner")
    of_kind = {kind: Paired(wins[wins["kind"] == kind], ("written_atom",), seed) for kind in KINDS}
    rows = []
    for kind, each in of_kind.items():
        if each["written_atom"].nunique() > 1:  # a single atom says nothing about others
            of_atom = each.wide.groupby("written_atom").agg(win=("win", "mean"), firings=("firings", "first"))
            by_firings = np.average(of_atom["win"], weights=of_atom["firings"])
            rows.append((scale, kind, *each.mean("win"), by_firings))
    facts: dict[str, Json] = {
        "verdict": {"outcome": verdict.outcome, "sentence": verdict.sentence},
        "without_kind": int(wide["written_atom"].nunique() - wins["written_atom"].nunique()),
    }
    if len(rows) == len(KINDS):
        register, bundle = of_kind.values()
        samples = (register["win"], bundle["win"], register["written_atom"], bundle["written_atom"])
        difference = register.lead("win", bundle)
        ends = {name: getattr(difference, name) for name in ("mean", "low", "high")}
        facts["difference"] = ends | {"p_value": stats.permutation_test(*samples, seed=seed).p_value}
    return pd.DataFrame(rows, columns=list(KIND_RATES)), facts


def alike_verdict(rates: Mapping[str, Estimate], gap: tuple[float, float], test: Mapping[str, str]) -> Verdict:
    """The outcome of claim 4 from the win rate of each kind, the interval of their difference, and the verdict on all
    tested firings."""
    kinds = {
        kind: judge(rate, chance=0.5, relevant=RELEVANT, what=f"the win rate of {kind} atoms against deletion")
        for kind, rate in rates.items()
    }
    verdicts = [Verdict(cast(Outcome, test["outcome"]), test["sentence"]), *kinds.values()]
    for outcome in ("below the floor", "inconclusive", "confounded", "undecided"):
        if stops := [each for each in verdicts if each.outcome == outcome]:
            return stops[0]
    if failed := [kind for kind, each in kinds.items() if each.outcome == "fails"]:
        return Verdict("fails", f"Deletion is not beaten by {' and '.join(failed)} atoms.")
    (low, high), both, size = gap, "Both kinds beat deletion", percent(RELEVANT)
    if low >= -RELEVANT and high <= RELEVANT:
        return Verdict("holds", f"{both}, and differ by no more than {size}.")
    if low > RELEVANT or high < -RELEVANT:
        return Verdict("fails", f"{both}, but not alike: they differ by more than {size}.")
    reach = f"an interval of their difference of [{points(low)}, {points(high)}] points"
    return Verdict("inconclusive", f"{both}, but {reach} shows neither sameness nor a difference of {size}.")


def alike(result: Result, controls: Sequence[str]) -> Finding:
    """Claim 4: both kinds beat deletion, and the interval of their difference lies within 10 points of zero."""
    claim, table = "register and bundle atoms substitute alike", result.tables["substitution"]
    compared = cast(Mapping[str, Mapping[str, float]], result.info.get("compared"))
    if set(table["kind"]) != set(KINDS):
        kinds = result.tables["atoms"]["kind"].tolist()
        counts = " and ".join(f"{kinds.count(kind)} {kind}" for kind in KINDS)
        reason = f"It needs two tested atoms of each kind; of the alive atoms there are {counts}."
        return Finding.untested(claim, reason, 4, "firings")
    rates = {
        str(row["kind"]): Estimate(row["rate"], row["low"], row["high"], row["n"], row["n_atoms"])
        for row in table.to_dict("records")
    }
    gap, test = compared["difference"], cast(Mapping[str, str], compared["verdict"])
    atoms = ", ".join(f"{rate.n_clusters} {kind} atoms" for kind, rate in rates.items())
    weighted = ", ".join(f"{row['kind']} {percent(row['by_firings'])}" for row in table.to_dict("records"))
    return Finding(
        number=4,
        claim=claim,
        ruled=alike_verdict(rates, (gap["low"], gap["high"]), test),
        chance=0.5,
        shown={kind: rates[kind] for kind in KINDS},
        write=percent,
        axis="of firings nearer to the native model than after deletion",
        measured=f"{atoms}; difference [{points(gap['low'])}, {points(gap['high'])}] points, p = "
        f"{gap['p_value']:.2g}; weighted by firings: {weighted}",
        controls=f"those of the substitution test: {', '.join(controls)}",
        n=sum(rate.n for rate in rates.values()),
        of="firings, by atom",
    )


def by_rule(tables: Mapping[str, pd.DataFrame]) -> Finding:
    """Claim 27 from the tables `atoms` of several rules, in the paper's order."""
    ordered, p_values, medians = {}, {}, {}
    for column in ("cosine", "shuffled"):
        pairs = itertools.combinations(tables, 2)
        tests = {f"{a} / {b}": float(ks_2samp(tables[a][column], tables[b][column]).pvalue) for a, b in pairs}  # pyright: ignore
        p_values[column] = stats.holm(tests)
        of_rule = [float(table.loc[table["kind"] == "register", column].median()) for table in tables.values()]
        falling = all(a > b for a, b in itertools.pairwise(of_rule))
        ordered[column] = max(p_values[column].values()) < 0.05 and falling
        medians[column] = ", ".join(f"{rule} {'–' if np.isnan(m) else f'{m:.3f}'}" for rule, m in zip(tables, of_rule))
    if ordered["cosine"] and ordered["shuffled"]:
        verdict = Verdict("confounded", "At shuffled positions the rules differ in the same way.")
    elif ordered["cosine"]:
        verdict = Verdict("holds", "Every pair of rules differs, in the paper's order.")
    else:
        verdict = Verdict("fails", "The rules do not all differ, or not in the paper's order.")
    return Finding(
        number=27,
        claim="alignment of registers falls with the rank of the write rule",
        ruled=verdict,
        measured=f"median cosine of registers: {medians['cosine']}; Kolmogorov-Smirnov, Holm-adjusted: "
        + ", ".join(f"{pair} p = {p:.2g}" for pair, p in p_values["cosine"].items()),
        controls=f"at shuffled positions: {medians['shuffled']}",
        n=sum(map(len, tables.values())),
        of="alive atoms",
    )
