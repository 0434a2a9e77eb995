"""What a partition says about the paper's claims, by the rules in `partition.Partition`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sae_lens_writesae.conditions import NAMES
from sae_lens_writesae.evaluation import Claim
from sae_lens_writesae.report_text import percent, span
from sae_lens_writesae.substitution_result import SubstitutionResult
from sae_lens_writesae.verdict import statistics as stats
from sae_lens_writesae.verdict.judge import NO_DATA, too_little

if TYPE_CHECKING:
    from sae_lens_writesae.partition import Partition

_NULLS = ("shuffled", "random")

#: Difference of BIC that counts as very strong evidence (Kass and Raftery, 1995).
STRONG = 10.0


def claims(result: Partition) -> list[Claim]:
    """Claims 6 and 4, and whether atoms point along their writes at all."""
    return [_two_kinds(result), _aligned(result), _alike(result)]


def preferred(mixtures: Any, sample: str, space: str) -> int | None:
    """Components of the mixture with the lowest BIC; None where none was fitted."""
    at = mixtures[(mixtures["sample"] == sample) & (mixtures["space"] == space) & mixtures["best"]]
    return None if at.empty else int(at["components"].iloc[0])


def gap_to_one(mixtures: Any, sample: str, space: str) -> float:
    """How much lower the best BIC is than that of a single Gaussian; 0 where that is the best."""
    at = mixtures[(mixtures["sample"] == sample) & (mixtures["space"] == space)]
    return float(at.loc[at["components"] == 1, "bic"].iloc[0] - at["bic"].min()) if len(at) else 0.0


def _two_kinds(result: Partition) -> Claim:
    info = result.info
    atoms: Any = result.tables["atoms"]
    threshold = info["config"]["threshold"]
    counts = atoms["kind"].value_counts()
    registers, bundles = int(counts.get("register", 0)), int(counts.get("bundle", 0))
    measured = f"{registers} register / {bundles} bundle / {info['dead']} dead"
    if registers:
        median = float(atoms.loc[atoms["kind"] == "register", "cosine"].median())
        measured += f"; register median cosine {median:.3f}"
    best = {(s, x): preferred(result.tables["mixtures"], s, x) for s in ("atoms", *_NULLS) for x in ("cosine", "z")}
    above = {name: (atoms[name] >= threshold).mean() for name in _NULLS}
    controls = "; ".join(
        f"{name} null: {percent(above[name])} at {threshold:g} or above, "
        f"BIC prefers {best[name, 'cosine'] or 'nothing'}"
        for name in _NULLS
    )
    excess = (atoms["cosine"] >= threshold).astype(float) - (atoms["shuffled"] >= threshold).astype(float)
    boot = stats.cluster_bootstrap(excess, atoms["atom"], seed=info["config"]["seed"])
    share = f"{percent((atoms['cosine'] >= threshold).mean())} of atoms reach {threshold:g}"
    found, gap = best["atoms", "cosine"], gap_to_one(result.tables["mixtures"], "atoms", "cosine")
    fit = f"BIC prefers {found} components on the cosine (by {gap:.0f} over one) and {best['atoms', 'z']} on Fisher's z"
    if len(atoms) < info["config"]["min_atoms"] or found is None:
        outcome = "not tested"
        sentence = f"{len(atoms)} alive atoms are too few, or too alike, to tell kinds apart."
    elif found != 2 or gap < STRONG:
        outcome, sentence = "fails", f"{fit}, so the cosine does not part the atoms into two kinds; {share}."
    elif gap_to_one(result.tables["mixtures"], "shuffled", "cosine") >= STRONG:
        outcome = "confounded"
        sentence = (
            f"{fit}, but at shuffled positions, where nothing can point along its write, it prefers "
            f"{best['shuffled', 'cosine']}: a mixture fits what is not normal, and shows no kinds."
        )
    elif not boot.interval.low > 0:
        span_ = span(boot.interval.low, boot.interval.high)
        outcome = "confounded"
        sentence = f"{fit}, but shuffled positions give as many registers (difference [{span_}] points)."
    else:
        span_ = span(boot.interval.low, boot.interval.high)
        outcome, sentence = "holds", f"{fit}; {share}, [{span_}] points more than at shuffled positions."
    return Claim(
        6, "atoms part into registers and bundles", measured, len(atoms), "alive atoms", controls, outcome, sentence
    )


def _aligned(result: Partition) -> Claim:
    seed = result.info["config"]["seed"]
    atoms: Any = result.tables["atoms"]
    gain = stats.cluster_bootstrap(atoms["cosine"] - atoms["shuffled"], atoms["atom"], stats.weighted_median, seed=seed)
    test = stats.paired_wilcoxon(atoms["cosine"], atoms["shuffled"])
    bounds = f"[{gain.interval.low:.3f}–{gain.interval.high:.3f}] " if len(atoms) > 1 else ""
    measured = f"median cosine {atoms['cosine'].median():.3f}; {gain.estimate:+.3f} {bounds}over shuffled positions"
    controls = ", ".join(f"{name} null {atoms[name].median():.3f}" for name in _NULLS)
    if len(atoms) < result.info["config"]["min_atoms"]:
        outcome, sentence = "not tested", f"{len(atoms)} alive atoms are too few."
    elif too_little(len(atoms), len(atoms), *gain.interval):
        outcome, sentence = "inconclusive", NO_DATA
    elif gain.interval.low > 0:
        outcome = "holds"
        sentence = f"The cosine is higher where the atom fires than elsewhere (Wilcoxon p = {test.p_value:.2g})."
    else:
        outcome, sentence = "fails", "Where the atom fires the write is no more like it than elsewhere."
    return Claim(
        None,
        "atoms point along the writes they fire on",
        measured,
        len(atoms),
        "alive atoms",
        controls,
        outcome,
        sentence,
    )


def joined(result: Partition, substitution: SubstitutionResult, seed: int) -> Partition:
    """The partition with a substitution test of the same dictionary, which claim 4 needs."""
    atoms, info = result.tables["atoms"], result.info
    tables = result.tables | {"substitution": by_kind(substitution, atoms, info)}
    return type(result)(info | compared(substitution, atoms, seed), tables)


def by_kind(substitution: SubstitutionResult | None, atoms: Any, info: dict[str, Any]) -> pd.DataFrame:
    """The table `substitution`: win rate against deletion of each kind, interval over atoms. Empty without a test.

    Raises ValueError for a test of another hook or dictionary.
    """
    columns = ["scale", "kind", "rate", "low", "high", "n", "n_atoms"]
    if substitution is None:
        return pd.DataFrame({name: pd.Series(dtype="object" if name in columns[:2] else "float") for name in columns})
    tested = substitution.info
    if (tested.hook_name, tested.d_sae) != (info["hook_name"], info["d_sae"]):
        raise ValueError(
            f"the substitution test is of {tested.hook_name} with {tested.d_sae} atoms, the partition of "
            f"{info['hook_name']} with {info['d_sae']}; give the test of the same SAE"
        )
    rows = []
    for scale in tested.config.scales:
        for kind, part in _wins(substitution, atoms, scale).groupby("kind"):
            rate = stats.success_rate(part["win"], part["atom"])
            if rate.n_clusters > 1:  # a single atom says nothing about others
                low, high = rate.bootstrap
                rows.append((scale, kind, rate.rate, low, high, rate.n, rate.n_clusters))
    return pd.DataFrame(rows, columns=columns)


def compared(substitution: SubstitutionResult, atoms: Any, seed: int) -> dict[str, Any]:
    """Register against bundle at the headline scale, as entries of `info`: the difference with its interval and p, the
    test's own verdict, and how many tested atoms have no kind."""
    scales = substitution.info.config.scales
    scale = "coefficient" if "coefficient" in scales else scales[0]
    verdict = substitution.summary().verdicts[scale]
    wins = _wins(substitution, atoms, scale)
    found: dict[str, Any] = {
        "headline_scale": scale,
        "verdict": verdict.outcome,
        "verdict_controls": [NAMES[name] for name in verdict.controls],
        "tested_without_kind": int(substitution.frame["written_atom"].nunique() - wins["atom"].nunique()),
    }
    register, bundle = (wins[wins["kind"] == kind] for kind in ("register", "bundle"))
    if min(register["atom"].nunique(), bundle["atom"].nunique()) >= 2:
        ids = (register["atom"], bundle["atom"])
        boot = stats.difference_bootstrap(register["win"], bundle["win"], *ids, seed=seed)
        test = stats.permutation_test(register["win"], bundle["win"], *ids, seed=seed)
        found["difference"] = {"estimate": boot.estimate, "low": boot.interval.low, "high": boot.interval.high}
        found["difference"]["p_value"] = test.p_value
    return found


def _wins(substitution: SubstitutionResult, atoms: Any, scale: str) -> Any:
    """One row per tested firing of an atom that has a kind: atom, kind, win."""
    wide: Any = substitution.wide()
    kinds = atoms.set_index("atom")["kind"]
    table = pd.DataFrame(
        {
            "atom": wide["written_atom"],
            "kind": wide["written_atom"].map(kinds),
            "win": (wide[f"atom/{scale}"] < wide["delete"]).astype(float),
        }
    )
    return table[table["kind"].notna()]


def _alike(result: Partition) -> Claim:
    info = result.info
    table: Any = result.tables["substitution"]
    claim = "register and bundle atoms substitute alike"
    if "difference" not in info:
        kinds = result.tables["atoms"]["kind"].to_list()
        counts = {kind: kinds.count(kind) for kind in ("register", "bundle")}
        if min(counts.values()) < 2:
            found = " and ".join(f"{n} {kind}" for kind, n in counts.items())
            why = f"Kinds are compared by at least two atoms each, and there are {found} atoms."
        elif "headline_scale" not in info:
            why = "It needs the substitution test of the same dictionary."
        else:
            why = "The substitution test has fewer than two atoms of one kind, so kinds cannot be compared."
        return Claim(4, claim, "–", 0, "firings", "", "not tested", why)
    rows = table[table["scale"] == info["headline_scale"]].set_index("kind")
    rates = {kind: rows.loc[kind] for kind in ("register", "bundle")}
    measured = "; ".join(
        f"{kind} {percent(row['rate'])} [{span(row['low'], row['high'])}] ({int(row['n_atoms'])} atoms)"
        for kind, row in rates.items()
    )
    gap = info["difference"]
    measured += f"; difference [{span(gap['low'], gap['high'])}] points, p = {gap['p_value']:.2g}"
    both = all(row["low"] > 0.5 for row in rates.values())
    if info["verdict"] == "below the floor":
        outcome, sentence = "below the floor", "Deletion itself moves the model by no more than the no-op."
    elif info["verdict"] == "inconclusive" or too_little(int(np.sum(rows["n"])), int(rows["n_atoms"].min())):
        outcome, sentence = "inconclusive", NO_DATA
    elif info["verdict"] in ("confounded", "undecided"):
        outcome, sentence = info["verdict"], f"Not beaten by the atoms: {', '.join(info['verdict_controls'])}."
    elif both and gap["p_value"] >= 0.05:
        outcome = "holds"
        sentence = "Both kinds beat deletion, and no difference is found; its interval says how large one could be."
    elif both:
        outcome, sentence = "fails", "Both kinds beat deletion, but not alike."
    else:
        low = [kind for kind, row in rates.items() if not row["low"] > 0.5]
        outcome, sentence = "fails", f"Deletion is not beaten by {' and '.join(low)} atoms."
    n = int(np.sum(rows["n"]))
    return Claim(4, claim, measured, n, "firings, by atom", "those of the substitution test", outcome, sentence)
