"""Seeds: what dictionaries that differ in their seed have in common, in numbers of atoms and atom by atom.

Source: WriteSAE (arXiv 2605.12770), which reports counts that vary by 4-12 % and fewer than 1 % of atoms that match at
cosine > 0.9. A matched cosine means nothing by itself, since the best of 2,048 partners is always somewhat alike, so
two nulls are matched in the same way.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import pandas as pd
import torch

from sae_lens_writesae.atom.low_rank import LowRank
from writesae.experiment.cosines import firing_cosines
from writesae.experiment.evaluation import Evaluation, Scope
from writesae.experiment.firings import Integers
from writesae.experiment.lab import Lab
from writesae.experiment.matching import match_atoms
from writesae.experiment.result import Claim, Figure, Result
from writesae.verdict import figures
from writesae.verdict.format import percent
from writesae.verdict.judge import Against, Verdict, judge, too_little
from writesae.verdict.statistics import Estimate, estimate, weighted_median

SAMPLES: dict[str, str] = {
    "atoms": "alive atoms of the two dictionaries",
    "random": "as many Gaussian directions on either side",
    "writes": "as many native writes on either side, of different sequences",
}
"""What is matched: the dictionaries and the two nulls."""
RELEVANT = 0.05
"""Difference of matched |cosines| that matters, and margin by which a null may be worse and still count as equal."""
_SHOWN = {"atoms": ("atoms", "atom"), "writes": ("native writes", "control"), "random": ("random directions", "soft")}
"""Name and colour of each sample in the figure."""


class Side(NamedTuple):
    """What one dictionary, or a null in its place, brings to a match."""

    numbers: Integers
    """[n] numbers of the atoms; running numbers in the nulls."""
    matrices: LowRank


@dataclass(frozen=True, kw_only=True)
class Seeds(Evaluation):
    """The dictionaries differ in their seed only. Their alive atoms are matched one to one, so that the sum of
    |cosines| is largest. Two nulls are matched in the same way: as many Gaussian directions, and as many native writes
    drawn at random from different sequences. Atoms and nulls have no pairing of their own, so the excess over a null is
    the median difference of sorted cosines, with an interval by a bootstrap over pairs.

    **Verdict** of claim 20, "seeds find the same kinds, not the same atoms": it *fails* where the numbers of alive
    atoms or of registers spread by more than 12 % of their mean, or more than 1 % of the matched atoms of some pair of
    dictionaries exceed cosine 0.9. Atoms that were never learned share nothing either, so it *holds* only where in
    every pair of dictionaries the atoms match better than random directions by 0.05 or more; otherwise it is
    *inconclusive*. (Any excess will not do: random atoms that fire are a little more alike than random directions.)

    "Seeds share atoms beyond chance" (a claim of this project): the ladder of `judge` on the excess over random
    directions, of the pair of dictionaries where it is smallest, against native writes drawn at random (the pair where
    the excess over them is smallest). A difference of 0.05 matters.
    """

    alive_tokens: int = 65_536
    """Aliveness is counted on the first so many evaluation tokens (all, where there are fewer)."""
    min_firings: int = 5
    """Firings on those tokens that make an atom alive."""
    threshold: float = 0.05
    """Median cosine with the native write from which on an atom is a register."""
    same: float = 0.9
    """|cosine| above which two atoms are the same (the paper's)."""
    largest_spread: float = 0.12
    """Spread of a count over seeds, (largest - smallest) / mean, up to which kinds are the same (the paper's 12 %)."""
    largest_share: float = 0.01
    """Share of matched atoms up to which atoms are not the same (the paper's 1 %)."""

    kind: ClassVar[str] = "seeds"
    question: ClassVar[str] = "Do seeds find the same atoms?"
    answers: ClassVar[tuple[int, ...]] = (20,)
    scope: ClassVar[Scope] = Scope.SEEDS
    at_least: ClassVar[dict[str, float]] = {"alive_tokens": 1, "min_firings": 1}
    columns: ClassVar[dict[str, dict[str, str]]] = {
        "counts": {
            "sae": "label of the dictionary",
            "alive": "number of atoms that fire at least min_firings times",
            "register": "number of these with a median cosine at the threshold or above",
            "dead": "number of atoms that never fire",
        },
        "matches": {
            "a": "label of one dictionary",
            "b": "label of the other",
            "sample": "; ".join(f"{name}: {meaning}" for name, meaning in SAMPLES.items()),
            "n": "number of matched pairs",
            "median": "median |cosine| of the matched pairs",
            "share_same": "share of pairs with a |cosine| above `same`",
            "excess": "median over pairs of the matched |cosine| of the atoms minus this sample's, both sorted",
            "excess_low": "lower end of its 95 % interval over pairs",
            "excess_high": "upper end of its 95 % interval over pairs",
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

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("same", "largest_spread", "largest_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in (0, 1], found {getattr(self, name)}")

    # -- measuring

    def measure(self, lab: Lab) -> dict[str, pd.DataFrame]:
        kinds = {label: f"{lab.hooks[label].name} with {sae.cfg.d_sae} atoms" for label, sae in lab.saes.items()}
        if len(set(kinds.values())) > 1:
            listed = "; ".join(f"{label}: {kind}" for label, kind in kinds.items())
            raise ValueError(f"seeds are compared on one hook and at one size, found {listed}")
        alive: dict[str, Side] = {}
        counts = []
        for label in lab.saes:
            row, alive[label] = self._counted(lab, label)
            counts.append(row)
        pools = _write_pools(lab, max(len(side.numbers) for side in alive.values()))
        rng = np.random.default_rng(self.seed)
        pairs = pd.concat(
            [
                _matched(a, b, sample, *sides)
                for a, b in itertools.combinations(lab.saes, 2)
                for sample, sides in _samples(alive[a], alive[b], pools, rng)
            ],
            ignore_index=True,
        )
        return {"counts": pd.DataFrame(counts), "matches": self.summary(pairs), "pairs": pairs}

    def _counted(self, lab: Lab, label: str) -> tuple[dict[str, object], Side]:
        """The row of `counts`, and the alive atoms."""
        firings = lab.firings(label)
        n_tokens = min(self.alive_tokens, lab.tokens.numel())
        alive = firings.alive(n_tokens, self.min_firings)
        lab.require(len(alive) > 0, f"{label} has no atom that fires {self.min_firings} times on {n_tokens:,} tokens")
        medians = firing_cosines(lab, alive, label).table.groupby("atom")["cosine"].median()
        row: dict[str, object] = {
            "sae": label,
            "alive": len(alive),
            "register": int((medians >= self.threshold).sum()),
            "dead": firings.n_atoms - len(firings.alive(n_tokens)),
        }
        return row, Side(alive, lab.atoms(alive, label))

    def summary(self, pairs: pd.DataFrame) -> pd.DataFrame:
        """The table `matches` of a table `pairs`."""
        rows = []
        for (a, b), both in pairs.groupby(["a", "b"], sort=False):
            cosines = {name: np.sort(both.loc[both["sample"] == name, "cosine"].to_numpy(float)) for name in SAMPLES}
            atoms = cosines["atoms"]
            for sample, x in cosines.items():
                n = min(len(x), len(atoms))
                excess = estimate(atoms[-n:] - x[-n:], np.arange(n), statistic=weighted_median, seed=self.seed)
                rows.append(
                    {
                        "a": a,
                        "b": b,
                        "sample": sample,
                        "n": len(x),
                        "median": np.median(x),
                        "share_same": (x > self.same).mean(),
                        "excess": excess.mean,
                        "excess_low": excess.low if n > 1 else excess.mean,
                        "excess_high": excess.high if n > 1 else excess.mean,
                    }
                )
        return pd.DataFrame(rows)

    # -- judging

    def claims(self, result: Result) -> list[Claim]:
        """Claim 20, and whether atoms match beyond chance."""
        return [self._same_kinds(result), self._beyond_chance(result)]

    def _same_kinds(self, result: Result) -> Claim:
        counts = result.tables["counts"]
        spread = {name: _spread(counts[name]) for name in ("alive", "register")}
        share = {name: float(_matches(result, name)["share_same"].max()) for name in SAMPLES}
        faults = []
        if any(x > self.largest_spread for x in spread.values()):
            faults.append(f"counts vary by more than {percent(self.largest_spread)}")
        if share["atoms"] > self.largest_share:
            faults.append(f"more than {percent(self.largest_share)} of atoms are the same")
        learned = self._excess(result, least=RELEVANT)
        if (few := too_little(_smallest(_matches(result, "random")))) is not None:
            verdict = Verdict("inconclusive", few)
        elif faults:
            verdict = Verdict("fails", f"{' and '.join(faults).capitalize()}.")
        elif learned.outcome == "holds":
            verdict = Verdict("holds", "Counts agree, and atoms do not.")
        else:
            verdict = Verdict("inconclusive", f"Nothing shows that anything was learned. {learned.sentence}")
        return Claim(
            20,
            "seeds find the same kinds, not the same atoms",
            f"alive vary by {percent(spread['alive'])}, registers by {percent(spread['register'])}; at most "
            f"{percent(share['atoms'])} of atoms match at cosine > {self.same:g}",
            len(counts),
            "seeds",
            f"random match {percent(share['random'])}, writes match {percent(share['writes'])}",
            verdict.outcome,
            verdict.sentence,
        )

    def _beyond_chance(self, result: Result) -> Claim:
        atoms, random, writes = (_matches(result, name) for name in SAMPLES)
        verdict = self._excess(result, {"native writes drawn at random": Against(_smallest(writes))})
        return Claim(
            None,
            "seeds share atoms beyond chance",
            f"median matched |cosine| {', '.join(f'{x:.2f}' for x in atoms['median'])}",
            int(atoms["n"].sum()),
            f"atom pairs of {len(atoms)} pairs of seeds",
            f"random directions {random['median'].max():.2f}, random native writes {writes['median'].max():.2f}",
            verdict.outcome,
            verdict.sentence,
        )

    def _excess(self, result: Result, against: Mapping[str, Against] | None = None, *, least: float = 0.0) -> Verdict:
        """Whether atoms match better than random directions, by more than `least`, in every pair of dictionaries."""
        random = _matches(result, "random")
        worst = random.iloc[int(random["excess_low"].argmin())]
        what = f"the excess over random directions of {worst['a']} and {worst['b']}, the pair that matches worst,"
        return judge(_smallest(random), against, chance=least, relevant=RELEVANT, what=what)

    def figures(self, result: Result) -> list[Figure]:
        """Matched cosines beside both nulls, best pair first."""
        pairs = result.tables["pairs"]
        shares = np.linspace(0, 1, 11)
        lines = []
        for sample, (name, colour) in _SHOWN.items():
            cosines = pairs[pairs["sample"] == sample].groupby(["a", "b"])["cosine"]
            each = np.array([np.quantile(x, 1 - shares) for _, x in cosines])  # [pairs of dictionaries, shares]
            band = (each.min(0).tolist(), each.max(0).tolist())
            lines.append(figures.Line(name, shares.tolist(), each.mean(0).tolist(), colour, band))
        svg = figures.curves(
            lines,
            "matched pairs, best first",
            f"Matched atoms of seeds: {result.label}",
            chance=self.same,
            ticks={float(share): f"{100 * share:.0f} %" for share in shares},
        )
        caption = "|cosine| of matched pairs: mean over pairs of dictionaries, and the range over them."
        return [Figure("How alike matched atoms are", svg, caption)]

    def notes(self, result: Result) -> list[str]:
        """How atoms are matched."""
        return ["Alive atoms are matched one to one, so that the sum of |cosines| is largest; so are both nulls."]


def _matches(result: Result, sample: str) -> pd.DataFrame:
    table = result.tables["matches"]
    return table[table["sample"] == sample]


def _smallest(matches: pd.DataFrame) -> Estimate:
    """The excess of the pair of dictionaries where it is smallest, with the fewest matched atoms of any pair."""
    worst = matches.iloc[int(matches["excess_low"].argmin())]
    n = int(matches["n"].min())
    return Estimate(float(worst["excess"]), float(worst["excess_low"]), float(worst["excess_high"]), n, n)


def _spread(counts: pd.Series) -> float:
    """(largest - smallest) / mean; 0 where all are 0."""
    return float((counts.max() - counts.min()) / counts.mean()) if counts.max() > 0 else 0.0


def _write_pools(lab: Lab, needed: int) -> tuple[LowRank, LowRank]:
    """Native writes of even and of odd sequences, at least `needed` each where there are so many."""
    pools = []
    for start in (0, 1):
        sequences = range(start, len(lab.tokens), 2)[: -(-needed // lab.tokens.shape[1]) + 1]
        writes = lab.native_writes(sequences)
        pools.append(writes.rows(writes.norm() > 0))
    return pools[0], pools[1]


def _samples(
    a: Side, b: Side, pools: tuple[LowRank, LowRank], rng: np.random.Generator
) -> Iterator[tuple[str, tuple[Side, Side]]]:
    """What is matched for one pair of dictionaries, by sample."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    random = [side.matrices.random_like(generator) for side in (a, b)]
    drawn = [rng.permutation(len(pool))[: len(side.numbers)] for pool, side in zip(pools, (a, b))]
    writes = [pool.rows(torch.tensor(rows)) for pool, rows in zip(pools, drawn)]
    yield "atoms", (a, b)
    for name, (one, other) in (("random", random), ("writes", writes)):
        yield name, (Side(np.arange(len(one)), one), Side(np.arange(len(other)), other))


def _matched(a: str, b: str, sample: str, one: Side, other: Side) -> pd.DataFrame:
    """The rows of `pairs` of one pair of dictionaries and one sample."""
    match = match_atoms(one.matrices, other.matrices)
    ids = {"first": one.numbers[match.first], "second": other.numbers[match.second]}
    return pd.DataFrame({"a": a, "b": b, "sample": sample, **ids, "cosine": match.cosine})
