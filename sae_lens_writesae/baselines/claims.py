"""What the baselines say, by the rules in `result.Baselines`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from sae_lens_writesae.baselines.result import Baselines
from sae_lens_writesae.baselines.writes import ATOM, ATOM_SVD, SVD
from sae_lens_writesae.conditions import NAMES, REFERENCES
from sae_lens_writesae.evaluation import Claim
from sae_lens_writesae.interventions.common import Estimate
from sae_lens_writesae.report_text import percent, span
from sae_lens_writesae.summary import EXACT_FLOOR
from sae_lens_writesae.verdict import statistics as stats
from sae_lens_writesae.verdict.judge import MIN_OBSERVATIONS, NO_DATA, too_little
from sae_lens_writesae.verdict.paper import Outcome

MATCH = 0.05
"""Largest difference of two numbers of parameters, relative, that counts as the same number."""
_WEAK = 0.001
"""Perplexity, relative, below which a replacement costs next to nothing (the paper's 0.1 %)."""
_FLOOR_NATS = 1e-6
_RELEVANT = 0.1
"""Difference of win rates that matters."""


def claims(result: Baselines) -> list[Claim]:
    """All of them, in the order of the rules."""
    table: Any = result.tables["dictionaries"]
    ours = result.of_variant("WriteSAE")
    flat = table[table["variant"] == "FlatSAE"]
    same = flat[flat["d_sae"] == ours["d_sae"]] if ours else flat[:0]
    near = flat[(flat["parameters"] / ours["parameters"] - 1).abs() <= MATCH] if ours else flat[:0]
    equal, matched = (found.iloc[0].to_dict() if len(found) else None for found in (same, near))
    return [
        _against_flat(result, 15, ours, equal, "as many atoms", "an atom", (ATOM, ATOM_SVD)),
        _against_flat(result, 15, ours, equal, "as many atoms", "a code", (SVD, SVD)),
        _against_flat(result, None, ours, matched, "as many parameters", "a code", (SVD, SVD)),
        _higher_rank(result, ours, 2, 16),
        *([_higher_rank(result, ours, 4, None)] if result.of_variant("WriteSAE-rank4") else []),
        _dead(result, ours, equal),
        _weak_metric(result),
        _selective(result, ours, equal),
    ]


def perplexity(cost: Estimate) -> str:
    """A cost in nats per token as a change of perplexity, with its interval."""
    mean, low, high = (100 * math.expm1(x) for x in cost[:3])
    return f"{mean:+.3g}\u00a0% [{low:+.3g}, {high:+.3g}]"


_HOW = {"as many atoms": "", "as many parameters": ": `matched_flat` says how many atoms that is"}


def _untested(number: int | None, claim: str, need: str) -> Claim:
    return Claim(number, claim, "–", 0, "dictionaries", "", "not tested", need)


def _against_flat(
    result: Baselines,
    number: int | None,
    ours: dict[str, Any] | None,
    flat: dict[str, Any] | None,
    how: str,
    what: str,
    conditions: tuple[str, str],
) -> Claim:
    """`conditions`: what the WriteSAE writes, and the flat SAE."""
    claim = f"{what} of the WriteSAE substitutes better than the top-1 SVD of {what} of a flat SAE with {how}"
    if ours is None or flat is None:
        return _untested(number, claim, f"It needs a WriteSAE and a FlatSAE with {how}{_HOW[how]}.")
    mine, theirs = (conditions[0], ours["sae"]), (conditions[1], flat["sae"])
    own, other, gap = result.win_rate(*mine), result.win_rate(*theirs), result.win_rate(*mine, minus=theirs)
    free = {name: result.win_rate(name) for name in result.free(all_components=conditions[0] == SVD)}
    rivals = [c for c in free if free[c].low > 0.5 and not result.win_rate(*mine, minus=(c, "")).low > 0]
    rivals.sort(key=lambda c: -free[c].mean)
    found: tuple[Outcome, str]
    if result.kl("delete").median() <= max(EXACT_FLOOR, float(result.kl("native").quantile(0.95))):
        found = "below the floor", "Deletion itself moves the model by no more than a no-op does."
    elif too_little(gap.n, gap.n_clusters, gap.low, gap.high, relevant=_RELEVANT):
        found = "inconclusive", NO_DATA
    elif not gap.low > 0:
        behind = "The flat SAE is ahead." if gap.high < 0 else "Neither is ahead of the other."
        found = "fails", f"The interval of the difference does not lie above 0. {behind}"
    elif rivals:
        found = "confounded", f"It is ahead, but does not beat what needs no dictionary: {_name(rivals[0])}."
    else:
        found = "holds", "It is ahead, and nothing that needs no dictionary does as well."
    measured = (
        f"{100 * gap.mean:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}] points; beat deletion: WriteSAE "
        f"{percent(own.mean)} [{span(own.low, own.high)}], flat {percent(other.mean)} [{span(other.low, other.high)}]"
    )
    shown = free | {name: result.win_rate(name) for name in REFERENCES}
    controls = "; ".join(f"{_name(c)} {percent(e.mean)}" for c, e in shown.items())
    return Claim(number, claim, measured, gap.n, f"positions in {gap.n_clusters} sequences", controls, *found)


def _higher_rank(result: Baselines, ours: dict[str, Any] | None, rank: int, number: int | None) -> Claim:
    name = f"WriteSAE-rank{rank}"
    claim, higher = f"rank-{rank} atoms cost no more perplexity than rank-1 atoms", result.of_variant(name)
    if ours is None or higher is None:
        return _untested(number, claim, f"It needs a WriteSAE and one with atoms of rank {rank} ({name}).")
    one, own = result.cost("dictionary", ours["sae"]), result.cost("dictionary", higher["sae"])
    gap = result.cost("dictionary", higher["sae"], minus=("dictionary", ours["sae"]))
    zero, mean = result.cost("zero"), result.cost("mean")
    over_mean = result.cost("mean", minus=("dictionary", higher["sae"]))
    found: tuple[Outcome, str]
    if not zero.low > _FLOOR_NATS:
        found = "below the floor", "Even with zero in the place of every matrix the model loses nothing."
    elif too_little(MIN_OBSERVATIONS, gap.n_clusters, gap.low, gap.high):  # one cost a sequence: clusters alone count
        found = "inconclusive", NO_DATA
    elif gap.low > 0:
        found = "fails", "The interval of the difference lies above 0."
    elif not over_mean.low > 0:
        found = "confounded", "So does one and the same mean matrix: this measure does not see what differs by token."
    else:
        found = "holds", "The interval of the difference does not lie above 0, and the mean matrix costs more."
    measured = f"perplexity {perplexity(own)} at rank {rank}, {perplexity(one)} at rank 1; difference {perplexity(gap)}"
    controls = f"mean matrix {perplexity(mean)}; zero {perplexity(zero)}"
    return Claim(number, claim, measured, gap.n, "sequences", controls, *found)


def _dead(result: Baselines, ours: dict[str, Any] | None, flat: dict[str, Any] | None) -> Claim:
    claim, dense = "the bilinear encoder leaves fewer atoms dead", result.of_variant("MatrixSAE")
    if ours is None or flat is None:
        return _untested(17, claim, "It needs a WriteSAE and a FlatSAE with as many atoms.")
    gap = _more_dead(flat, ours, result.info["config"]["seed"])
    controls, as_few = "a dense encoder with rank-1 atoms (MatrixSAE) was not given", False
    if dense is not None and dense["d_sae"] == ours["d_sae"]:
        as_few = not _more_dead(dense, ours, result.info["config"]["seed"]).interval.low > 0
        controls = f"dense encoder with rank-1 atoms {percent(dense['dead'] / dense['d_sae'])} dead"
    found: tuple[Outcome, str]
    if too_little(gap.n, gap.n_clusters, *gap.interval):
        found = "inconclusive", NO_DATA
    elif not gap.interval.low > 0:
        found = "fails", "The interval of the difference of shares does not lie above 0."
    elif as_few:
        found = "confounded", "A dense encoder with rank-1 atoms leaves as few dead: it is the decoder."
    else:
        found = "holds", "The interval of the difference of shares lies above 0."
    shares = [row["dead"] / row["d_sae"] for row in (ours, flat)]
    measured = (
        f"dead: WriteSAE {percent(shares[0])}, FlatSAE {percent(shares[1])}; difference "
        f"[{100 * gap.interval.low:+.1f}, {100 * gap.interval.high:+.1f}] points"
    )
    return Claim(17, claim, measured, int(ours["d_sae"] + flat["d_sae"]), "atoms", controls, *found)


def _more_dead(a: dict[str, Any], b: dict[str, Any], seed: int) -> stats.Bootstrap:
    """Share of dead atoms of `a` minus that of `b`."""
    dead = [np.arange(row["d_sae"]) < row["dead"] for row in (a, b)]
    return stats.difference_bootstrap(*dead, *(np.arange(len(x)) for x in dead), seed=seed)


def _weak_metric(result: Baselines) -> Claim:
    claim = "states cut to rank 1 cost less than 0.1 % of perplexity, so that whole replacement says little"
    table: Any = result.tables["replacement"]
    if "rank 1" not in set(table["method"]):
        return _untested(None, claim, "It needs rank 1 among state_ranks, and states of a higher rank.")
    cost, zero = result.cost("rank 1", hook="state"), None
    if result.info["target"] == "state":
        zero = result.cost("zero")
    found: tuple[Outcome, str]
    if zero is not None and not zero.low > _FLOOR_NATS:
        found = "below the floor", "Even states of zero cost nothing."
    elif too_little(MIN_OBSERVATIONS, cost.n_clusters, cost.low, cost.high):
        found = "inconclusive", NO_DATA
    elif math.expm1(cost.high) < _WEAK:
        found = "holds", "The interval ends below 0.1 %."
    else:
        found = "fails", "The interval reaches 0.1 % or more."
    others = [f"rank {r} {perplexity(result.cost(f'rank {r}', hook='state'))}" for r in _other_ranks(table)]
    others += [] if zero is None else [f"zero {perplexity(zero)}"]
    return Claim(None, claim, perplexity(cost), cost.n, "sequences", "; ".join(others), *found)


def _other_ranks(replacement: Any) -> list[int]:
    methods = replacement.loc[replacement["hook"] == "state", "method"].drop_duplicates()
    return [int(m.split()[1]) for m in methods if m.startswith("rank ") and m != "rank 1"]


def _selective(result: Baselines, ours: dict[str, Any] | None, flat: dict[str, Any] | None) -> Claim:
    claim = "atoms fire on a token of their own more than chance has it"
    own = result.excess(ours["sae"]) if ours else None
    if ours is None or own is None:
        return _untested(None, claim, "It needs a WriteSAE with two atoms or more that fire often enough.")
    table: Any = result.tables["selectivity"]
    other = result.excess(flat["sae"]) if flat else None
    controls, as_much = "no FlatSAE with as many atoms was given", False
    if flat is not None and other is not None:
        sides = [table[table["sae"] == row["sae"]] for row in (ours, flat)]
        values = [side["share"] - side["chance"] for side in sides]
        gap = stats.difference_bootstrap(*values, *(side["atom"] for side in sides), seed=result.info["config"]["seed"])
        as_much = not gap.interval.low > 0
        controls = f"FlatSAE {other.estimate:+.2f} [{other.interval.low:+.2f}, {other.interval.high:+.2f}]"
    found: tuple[Outcome, str]
    if too_little(own.n, own.n_clusters, *own.interval):
        found = "inconclusive", NO_DATA
    elif not own.interval.low > 0:
        found = "fails", "The interval does not lie above 0."
    elif as_much:
        found = "confounded", "So do the atoms of a FlatSAE (mean over atoms): the measure does not set them apart."
    else:
        found = "holds", "The interval lies above 0, and above the atoms of a FlatSAE where there is one."
    measured = (
        f"median share of the most frequent token minus chance {own.estimate:+.2f} "
        f"[{own.interval.low:+.2f}, {own.interval.high:+.2f}]"
    )
    return Claim(None, claim, measured, own.n, "atoms", controls, *found)


def _name(condition: str) -> str:
    """As a reader meets it."""
    head, _, rank = condition.partition(" ")
    return f"{rank} principal component{'s' * (rank != '1')}" if head == "pca" else NAMES[condition]
