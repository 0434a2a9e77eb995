"""Baselines: what a WriteSAE is to be compared with, other architectures and directions that need no dictionary.

The question has four measures (substitution, whole replacement, two of selectivity) and eight claims, hence the length.
What is written, and what a replacement costs, is in `experiment.approximations` and `experiment.reconstruction`.

Source: WriteSAE (arXiv 2605.12770), its comparisons of architectures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pandas as pd

from sae_lens_writesae.sae.kinds import n_parameters, variant
from writesae.experiment.approximations import (
    ATOM,
    ATOM_SVD,
    SVD,
    Basis,
    Written,
    of_dictionary,
    without_dictionary,
)
from writesae.experiment.evaluation import Evaluation, Scope
from writesae.experiment.firings import halves
from writesae.experiment.lab import Lab, Site, Trial
from writesae.experiment.readout import kl_window
from writesae.experiment.reconstruction import matrices_of, reconstruction, replacement_costs
from writesae.experiment.result import Claim, Figure, Result
from writesae.experiment.selectivity import direction_selectivity, own_tokens
from writesae.verdict import figures
from writesae.verdict.format import percent, span
from writesae.verdict.judge import Against, judge
from writesae.verdict.names import NAMES
from writesae.verdict.statistics import Estimate, estimate, estimate_difference, success_rate, weighted_median

CONDITIONS: dict[str, str] = {
    ATOM: "strongest atom",
    ATOM_SVD: "atom cut to rank 1",
    SVD: "top-1 SVD of the reconstruction",
}
"""What a dictionary writes, as a reader meets it."""
DICTIONARY_FREE = ("random", "mean", "state")
"""Controls that need no dictionary, besides the principal components."""

RELEVANT = 0.1
"""Difference of two shares (win rates, dead atoms, firings at one token) from which on it matters, and margin by which
a control may be worse and still count as equal."""
RELEVANT_SELECTIVITY = 0.01
"""Difference of two selectivities that matters. The paper's 47 heads lie between 0.96 and 1."""
SMALL_COST = math.log1p(0.001)
"""Nats per token, 0.1 % of perplexity, below which a cost does not matter (the paper's "negligible")."""
SAME_SIZE = 0.05
"""Largest relative difference of two numbers of parameters that counts as the same number."""
_COLOURS = {ATOM: "atom", ATOM_SVD: "soft", SVD: "ink"}
_MATCH = {"as many atoms": "", "as many parameters": ": `matched_flat` says how many atoms that is"}

Condition = tuple[str, str]
"""What is written, and the label of its dictionary; "" where it needs none."""


@dataclass(frozen=True, kw_only=True)
class Baselines(Evaluation):
    """Dictionaries of one head that differ in architecture, beside what needs no dictionary. Means and principal
    components come from one half of the sequences, tests from the other.

    **Substitution.** At positions drawn uniformly, the same for all, the native write gives way to: the dictionary's
    strongest atom by |a_i| |A_i| (`atom`; cut to rank 1 where it is of a higher rank, `atom svd`); the top-1 SVD of its
    reconstruction (`svd`: for a FlatSAE the paper's baseline); a random direction; the head's mean write; the top
    singular direction of the state before the write (that of the state after it contains the write: a reference, never
    held against an atom); and the projection of the write on the first principal components of writes (`pca r`). A
    win: the KL divergence from the native distributions, mean over t..t+horizon, is smaller than after deletion.
    Differences of win rates are paired.

    **Whole-matrix replacement.** Every write (state) of the head gives way to its reconstruction at once. The cost is
    in nats per token, and as perplexity exp(cost) - 1. Beside it: the mean matrix, zero, `pca r`, and states cut to
    rank r. Replacing all by itself is the no-op that measures the floor.

    **Own tokens** of an atom (this project's): the share of its most frequent token among its firings, minus the same
    share for as many positions drawn at random.

    **Selectivity** of a direction (the paper's, I.1): 1 - overlap of the `top_tokens` tokens that the strongest atom
    moves most, where it is added to the write at the write's norm, with those that a random direction moves there.

    The WriteSAE is the first dictionary with rank-1 atoms and a bilinear encoder, the FlatSAE the first dense one with
    as many atoms (or, once more, as many parameters within 5 %). Intervals are over sequences, and over atoms for dead
    atoms and own tokens. Dictionaries of one variant that differ in their seed are joined in the table `variants` of
    the page (the paper's table 7: explained variance by variant and seed); claims are about the first of each variant.

    **Verdicts** by the ladder of `judge`:

    * Claim 15, a WriteSAE substitutes better than a flat SAE with a top-1 SVD, like for like: strongest atom against
      the flat SAE's atom cut to rank 1, and top-1 SVD of the reconstruction against that of the flat one. The effect is
      the difference of win rates (10 points matter), against everything that needs no dictionary: an atom against the
      first of `pca_ranks` alone, a reconstruction against all of them.
    * Claim 16, rank-2 atoms cost no more perplexity: the interval of cost(rank 2) - cost(rank 1) ends below 0.1 % of
      perplexity, against the mean matrix; below the floor where replacing all by zero costs nothing. Atoms of rank 4,
      where there are any, by the same rule.
    * Claim 17, fewer dead atoms than the FlatSAE: the difference of shares (10 points matter), against a dense encoder
      with rank-1 atoms (MatrixSAE), where there is one.
    * States cut to rank 1 cost less than 0.1 % of perplexity. Where that holds, the measure says little of
      dictionaries.
    * Atoms fire at a token of their own: the median excess over chance, against the atoms of the FlatSAE.
    * Claim 28, an atom moves other tokens than a random direction: the ladder on its selectivity minus that of a second
      random direction (0.01 matters). The paper finds no difference from directions without meaning.
    """

    test_sequences: int = 40
    """Sequences of the test half on which writes are exchanged and reconstruction is measured (all, if fewer)."""
    positions_per_sequence: int = 2
    """Positions of each, drawn uniformly; every dictionary and every control writes at the same ones."""
    scale: Literal["coefficient", "matched"] = "coefficient"
    """Size of what is written. `coefficient`: as the dictionary or the projection gives it; a direction that has none
    (random, mean, state, state_after) gets the projection of the native write on it, its best. `matched`: the norm of
    the native write for all, at which what has a cosine below 1/2 with the write is further from it than nothing."""
    pca_ranks: tuple[int, ...] = (1, 4, 32)
    """Numbers of principal components of the head's writes, rising."""
    pca_writes: int = 1024
    """Writes that the components are fitted to, drawn from the other half."""
    state_ranks: tuple[int, ...] = (1, 2, 4)
    """Ranks at which whole states are cut, rising."""
    replacement_sequences: int = 16
    """Sequences of the test half on which whole matrices are replaced."""
    horizon: int = 16
    """KL is averaged over t..t+horizon, both included."""
    first_position: int = 1
    """Positions before this one are not drawn."""
    alive_tokens: int = 65_536
    """Dead atoms are those that never fire on the first so many tokens (all, where there are fewer)."""
    min_firings: int = 5
    """Firings of an atom below which its own token is not looked for."""
    top_tokens: int = 32
    """Tokens that are compared for the selectivity of directions (the paper's K)."""

    kind: ClassVar[str] = "baselines"
    question: ClassVar[str] = "Do rank-1 atoms do better than what is simpler?"
    answers: ClassVar[tuple[int, ...]] = (15, 16, 17, 28)
    scope: ClassVar[Scope] = Scope.VARIANTS
    at_least: ClassVar[dict[str, float]] = {
        "test_sequences": 2,
        "replacement_sequences": 2,
        "pca_writes": 2,
        "positions_per_sequence": 1,
        "horizon": 1,
        "first_position": 0,
        "alive_tokens": 1,
        "min_firings": 1,
        "top_tokens": 1,
    }
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"scale": ("coefficient", "matched")}
    columns: ClassVar[dict[str, dict[str, str]]] = {
        "dictionaries": {
            "sae": "label of the dictionary",
            "variant": "which of the paper's variants it is, or other",
            "d_sae": "number of atoms",
            "parameters": "numbers that are trained",
            "explained": "share of the variance of its target that it explains, mean over sequences",
            "l0": "active atoms per token",
            "alive": "number of atoms that fire",
            "dead": "number of atoms that never fire",
        },
        "writes": {
            "sequence": "row of the evaluation tokens",
            "position": "token t that is edited",
            "sae": "label of the dictionary; empty where none is needed",
            "condition": "native, delete, random, mean, state, state_after, pca r; atom, atom svd, svd",
            "kl": "nats, mean over t..t+horizon of KL(native || edited)",
            "cosine": "cosine of what is written and the native write",
            "norm": "Frobenius norm of what is written over that of the native write",
        },
        "replacement": {
            "sequence": "row of the evaluation tokens",
            "sae": "label of the dictionary; empty where none is needed",
            "hook": "what is replaced: write or state",
            "method": "itself, dictionary, mean, zero, pca r; for states rank r",
            "nats": "nats per token, more than without replacement",
            "native_nats": "nats per token without replacement",
        },
        "own_tokens": {
            "sae": "label of the dictionary",
            "atom": "atom that fires often enough",
            "firings": "number of its firings",
            "token": "the most frequent token among them",
            "share": "share of this token among the firings",
            "chance": "the same share for as many random positions",
        },
        "selectivity": {
            "sae": "label of the dictionary",
            "sequence": "row of the evaluation tokens",
            "position": "token t at which the strongest atom is added",
            "selectivity": "1 - overlap of the tokens that it moves most with those of a random direction",
            "chance": "the same of a second random direction",
        },
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("pca_ranks", "state_ranks"):
            ranks = getattr(self, name)
            if not ranks or min(ranks) < 1 or list(ranks) != sorted(set(ranks)):
                raise ValueError(f"{name} must rise from 1 or more, found {list(ranks)}")

    @property
    def shortest(self) -> int:
        return self.first_position + self.horizon + 2

    # -- measuring

    def measure(self, lab: Lab) -> dict[str, pd.DataFrame]:
        if len({hook.name for hook in lab.hooks.values()}) > 1:
            listed = "; ".join(f"{label}: {hook.name}" for label, hook in lab.hooks.items())
            raise ValueError(f"baselines are compared on one hook, found {listed}")
        split = halves(len(lab.tokens), self.seed)
        basis = Basis.fit(lab, split.select.tolist(), self.pca_writes, self.pca_ranks[-1])
        tested = split.test[: self.test_sequences]
        written, directions = [], []
        for site in lab.sites(pd.DataFrame({"sequence": tested}), "writes"):
            written.append(self.exchanged(lab, site, basis))
            directions.append(self.selective(lab, site))
        writes = pd.concat(written, ignore_index=True)
        lab.require(
            not writes.empty and writes["sequence"].nunique() > 1,
            "the head writes nothing at the drawn positions of all but one sequence",
        )
        replaced = split.test[: self.replacement_sequences].tolist()
        costs = [
            replacement_costs(lab, sequence, basis, self.pca_ranks, self.state_ranks)
            for sequence in lab.bar(replaced, "replacement")
        ]
        own = [
            own_tokens(lab.firings(label), lab.tokens, self.min_firings, lab.rng(8)).assign(sae=label)
            for label in lab.saes
        ]
        lab.facts["d_vocab"] = int(lab.model.cfg.d_vocab)
        return {
            "dictionaries": self._dictionaries(lab, tested.tolist()),
            "writes": writes,
            "replacement": pd.concat(costs, ignore_index=True),
            "own_tokens": pd.concat(own, ignore_index=True),
            "selectivity": pd.concat(directions, ignore_index=True),
        }

    def exchanged(self, lab: Lab, site: Site, basis: Basis) -> pd.DataFrame:
        """Rows of the table `writes` for one sequence; none where the writes at all drawn positions are zero.

        Cost: per position 2 edited rows and one for each baseline, of horizon + 1 tokens.
        """
        positions = self._positions(lab, site)
        left_out = self.positions_per_sequence - len(positions)
        lab.skipped["positions with a zero native write, or no room for the window"] += left_out
        native = site.at(positions)
        baselines = [Written("", "native", native, True), Written("", "delete", native * 0.0, True)]
        if positions:
            baselines += without_dictionary(lab, site, native, positions, basis, self.pca_ranks)
            for label in lab.saes:
                matrices = matrices_of(site.recurrence, lab.hooks[label].target)[positions]
                baselines += of_dictionary(lab, label, matrices, native)
        trials = []
        for each in baselines:
            written = each.matrices if each.condition in ("native", "delete") else each.sized(native, self.scale)
            cosines, norms = written.cosine(native).tolist(), (written.norm() / native.norm()).tolist()
            for n, t in enumerate(positions):
                row = {"sequence": site.sequence, "position": t, "sae": each.sae, "condition": each.condition}
                row |= {"cosine": cosines[n], "norm": norms[n]}
                trials.append(Trial(row, t, lab.replace(t, written, n)))
        return lab.read(site, trials, kl_window, self.horizon + 1)

    def selective(self, lab: Lab, site: Site) -> pd.DataFrame:
        """Rows of the table `selectivity` for one sequence, at the positions of `exchanged`."""
        positions = self._positions(lab, site)
        if not positions:
            return pd.DataFrame()
        atoms = {}
        for label in lab.saes:
            matrices = matrices_of(site.recurrence, lab.hooks[label].target)[positions]
            atoms[label] = next(iter(of_dictionary(lab, label, matrices, site.at(positions)))).matrices
        return direction_selectivity(lab, site, positions, atoms, self.top_tokens)

    def _positions(self, lab: Lab, site: Site) -> list[int]:
        """A uniform draw of the positions with a write that leave room for the window, in order."""
        written = np.flatnonzero((site.writes.norm() > 0).cpu().numpy())
        able = written[(written >= self.first_position) & (written < len(site.writes) - self.horizon)]
        drawn = lab.rng(9, site.sequence).choice(able, min(self.positions_per_sequence, len(able)), replace=False)
        return sorted(drawn.tolist())

    def _dictionaries(self, lab: Lab, tested: list[int]) -> pd.DataFrame:
        fits = reconstruction(lab, tested)
        n_tokens = min(self.alive_tokens, lab.tokens.numel())
        rows = []
        for label, sae in lab.saes.items():
            fit, d_sae, alive = fits[fits["sae"] == label], int(sae.cfg.d_sae), len(lab.firings(label).alive(n_tokens))
            lab.require(not fit.empty, f"{label}: what it reconstructs does not vary on any test sequence")
            row = {"sae": label, "variant": variant(sae), "d_sae": d_sae, "parameters": n_parameters(sae)}
            row |= {"explained": fit["explained"].mean(), "l0": fit["l0"].mean(), "alive": alive, "dead": d_sae - alive}
            rows.append(row)
        return pd.DataFrame(rows)

    # -- judging

    def claims(self, result: Result) -> list[Claim]:
        """Claims 15 to 17, whether whole replacement measures anything, own tokens, claim 28."""
        table, ours = result.tables["dictionaries"], of_variant(result, "WriteSAE")
        same, near = None, None
        if ours is not None:
            flat = table[table["variant"] == "FlatSAE"]
            same = _first(flat[flat["d_sae"] == ours["d_sae"]])
            near = _first(flat[(flat["parameters"] / ours["parameters"] - 1).abs() <= SAME_SIZE])
        higher = [self._higher_rank(result, ours, 2, 16)]
        if of_variant(result, "WriteSAE-rank4") is not None:
            higher.append(self._higher_rank(result, ours, 4, None))
        return [
            self._against_flat(result, ours, same, "as many atoms", (ATOM, ATOM_SVD)),
            self._against_flat(result, ours, same, "as many atoms", (SVD, SVD)),
            self._against_flat(result, ours, near, "as many parameters", (SVD, SVD)),
            *higher,
            self._dead(result, ours, same),
            self._low_rank_states(result),
            self._own_token(result, ours, same),
            self._selective(result, ours),
        ]

    def summaries(self, result: Result) -> dict[str, pd.DataFrame]:
        """`variants`: dictionaries of one kind over their seeds. `cosines`: what is written beside the native write."""
        of_kind = result.tables["dictionaries"].groupby(["variant", "d_sae"], sort=False)
        variants = of_kind.agg(
            dictionaries=("sae", "size"),
            explained=("explained", "mean"),
            explained_lowest=("explained", "min"),
            explained_highest=("explained", "max"),
            l0=("l0", "mean"),
            dead=("dead", "mean"),
        )
        medians = result.tables["writes"].groupby(["sae", "condition"], sort=False)[["cosine", "norm"]].median()
        return {"variants": variants.reset_index(), "cosines": medians.reset_index()}

    def _against_flat(
        self, result: Result, ours: pd.Series | None, flat: pd.Series | None, size: str, conditions: tuple[str, str]
    ) -> Claim:
        """`conditions`: what the WriteSAE writes, and what the flat SAE writes."""
        what, ranks = ("an atom", self.pca_ranks[:1]) if conditions[0] == ATOM else ("a code", self.pca_ranks)
        claim = f"{what} of the WriteSAE substitutes better than the top-1 SVD of {what} of a flat SAE with {size}"
        number = 15 if size == "as many atoms" else None
        if ours is None or flat is None:
            return _untested(number, claim, f"It needs a WriteSAE and a FlatSAE with {size}{_MATCH[size]}.")
        mine, theirs = (conditions[0], str(ours["sae"])), (conditions[1], str(flat["sae"]))
        gap = win_rate(result, mine, theirs)
        free = {c: win_rate(result, (c, "")) for c in (*DICTIONARY_FREE, *(f"pca {rank}" for rank in ranks))}
        verdict = judge(
            gap,
            {_name(c): Against(win_rate(result, mine, (c, "")), _over_half(rate)) for c, rate in free.items()},
            typical=float(kl(result, "delete").median()),
            floor=float(kl(result, "native").quantile(0.95)),
            relevant=RELEVANT,
            what="the difference of win rates",
        )
        rates = [win_rate(result, condition) for condition in (mine, theirs)]
        beat = ", ".join(f"{n} {percent(r.mean)} [{span(r.low, r.high)}]" for n, r in zip(("WriteSAE", "flat"), rates))
        shown = free | {"state_after": win_rate(result, ("state_after", ""))}
        return Claim(
            number,
            claim,
            f"{_points(gap)}; beat deletion: {beat}",
            gap.n,
            f"positions in {gap.n_clusters} sequences",
            "; ".join(f"{_name(c)} {percent(rate.mean)}" for c, rate in shown.items()),
            *verdict[:2],
        )

    def _higher_rank(self, result: Result, ours: pd.Series | None, rank: int, number: int | None) -> Claim:
        claim, name = f"rank-{rank} atoms cost no more perplexity than rank-1 atoms", f"WriteSAE-rank{rank}"
        other = of_variant(result, name)
        if ours is None or other is None:
            return _untested(number, claim, f"It needs a WriteSAE and one with atoms of rank {rank} ({name}).")
        high, one = ("dictionary", str(other["sae"])), ("dictionary", str(ours["sae"]))
        gap, zero, mean = cost(result, high, one), cost(result, ("zero", "")), cost(result, ("mean", ""))
        verdict = judge(
            gap,
            {"the mean matrix": Against(cost(result, high, ("mean", "")))},
            typical=zero.low,
            floor=no_op_cost(result),
            chance=SMALL_COST,
            less=True,
            relevant=SMALL_COST,
            what="the difference of costs",
        )
        return Claim(
            number,
            claim,
            f"perplexity {perplexity(cost(result, high))} at rank {rank}, {perplexity(cost(result, one))} at rank 1; "
            f"difference {perplexity(gap)}",
            gap.n_clusters,
            "sequences",
            f"mean matrix {perplexity(mean)}; zero {perplexity(zero)}",
            *verdict[:2],
        )

    def _dead(self, result: Result, ours: pd.Series | None, flat: pd.Series | None) -> Claim:
        claim, dense = "the bilinear encoder leaves fewer atoms dead", of_variant(result, "MatrixSAE")
        if ours is None or flat is None:
            return _untested(17, claim, "It needs a WriteSAE and a FlatSAE with as many atoms.")
        gap = _more_dead(flat, ours, self.seed)
        controls, against = "a dense encoder with rank-1 atoms (MatrixSAE) was not given", {}
        if dense is not None and dense["d_sae"] == ours["d_sae"]:
            against = {"a dense encoder with rank-1 atoms": Against(_more_dead(dense, ours, self.seed))}
            controls = f"dense encoder with rank-1 atoms {percent(dense['dead'] / dense['d_sae'])} dead"
        shares = [percent(row["dead"] / row["d_sae"]) for row in (ours, flat)]
        return Claim(
            17,
            claim,
            f"dead: WriteSAE {shares[0]}, FlatSAE {shares[1]}; difference {_points(gap)}",
            gap.n,
            "atoms",
            controls,
            *judge(gap, against, relevant=RELEVANT, what="the difference of the shares of dead atoms")[:2],
        )

    def _low_rank_states(self, result: Result) -> Claim:
        claim = "states cut to rank 1 cost less than 0.1 % of perplexity, so that whole replacement says little"
        table = result.tables["replacement"]
        methods = list(dict.fromkeys(table.loc[table["hook"] == "state", "method"]))
        if "rank 1" not in methods:
            return _untested(None, claim, "It needs rank 1 among state_ranks, and states of a higher rank.")
        first = cost(result, ("rank 1", ""), hook="state")
        zero = cost(result, ("zero", "")) if result.info["target"] == "state" else None
        verdict = judge(
            first,
            typical=None if zero is None else zero.low,
            floor=no_op_cost(result),
            chance=SMALL_COST,
            less=True,
            relevant=SMALL_COST,
            what="the cost",
        )
        ranks = [method for method in methods if method.startswith("rank ") and method != "rank 1"]
        others = [f"{method} {perplexity(cost(result, (method, ''), hook='state'))}" for method in ranks]
        others += [] if zero is None else [f"zero {perplexity(zero)}"]
        return Claim(None, claim, perplexity(first), first.n_clusters, "sequences", "; ".join(others), *verdict[:2])

    def _selective(self, result: Result, ours: pd.Series | None) -> Claim:
        claim, table = "an atom moves other tokens than a random direction of its norm", result.tables["selectivity"]
        rows = table if ours is None else table[table["sae"] == ours["sae"]]
        if ours is None or len(rows) < 2:
            return _untested(28, claim, "It needs a WriteSAE whose atoms fire at two positions or more.")
        own, chance, lead = (
            estimate(values, rows["sequence"], seed=self.seed)
            for values in (rows["selectivity"], rows["chance"], rows["selectivity"] - rows["chance"])
        )
        verdict = judge(lead, relevant=RELEVANT_SELECTIVITY, what="the lead over a direction without meaning")
        k, vocabulary = self.top_tokens, int(result.fact("d_vocab"))
        controls = f"a second random direction {chance.mean:.4f}; two random sets of tokens {1 - k / vocabulary:.4f}"
        measured = f"selectivity {own.mean:.4f} [{own.low:.4f}, {own.high:.4f}] at K = {k}; lead {lead}"
        return Claim(28, claim, measured, own.n, f"positions in {own.n_clusters} sequences", controls, *verdict[:2])

    def _own_token(self, result: Result, ours: pd.Series | None, flat: pd.Series | None) -> Claim:
        claim = "atoms fire on a token of their own more than chance has it"
        mine = None if ours is None else excess(result, str(ours["sae"]))
        if ours is None or mine is None:
            return _untested(None, claim, "It needs a WriteSAE with two atoms or more that fire often enough.")
        controls, against = "no FlatSAE with as many atoms was given", {}
        other = None if flat is None else excess(result, str(flat["sae"]))
        if flat is not None and other is not None:
            table = result.tables["own_tokens"]
            sides = [table[table["sae"] == row["sae"]] for row in (ours, flat)]
            values = [side["share"] - side["chance"] for side in sides]
            gap = estimate_difference(*values, *(side["atom"] for side in sides), seed=self.seed)
            against = {"the atoms of the FlatSAE (mean over atoms)": Against(gap)}
            controls = f"FlatSAE {other.mean:+.2f} [{other.low:+.2f}, {other.high:+.2f}]"
        measured = f"median share of the most frequent token minus chance {mine.mean:+.2f} "
        measured += f"[{mine.low:+.2f}, {mine.high:+.2f}]"
        verdict = judge(mine, against, relevant=RELEVANT, what="the excess over chance")
        return Claim(None, claim, measured, mine.n, "atoms", controls, *verdict[:2])

    def figures(self, result: Result) -> list[Figure]:
        """Win rates, costs of replacement, costs of states of low rank, own tokens."""
        name, target = result.label, str(result.info["target"])
        wins = figures.intervals(_wins(result), "% of positions", f"Win rates: {name}", chance=0.5, percent=True)
        costs = figures.intervals(_costs(result), "% of perplexity", f"Costs of replacement: {name}")
        caption = "The same positions for all. What needs no dictionary comes first."
        panels = [
            Figure("Nearer to the native model than deletion", wins, caption),
            Figure(f"All {target}s replaced at once", costs, "Change of perplexity, mean over sequences."),
        ]
        table = result.tables["replacement"]
        methods = table.loc[table["method"].str.startswith("rank "), "method"].drop_duplicates()
        rows = [_cost_row(f"states: {m}", cost(result, (m, ""), hook="state"), "control") for m in methods]
        if rows:
            svg = figures.intervals(rows, "% of perplexity", f"Costs of states of low rank: {name}")
            panels.append(Figure("States cut to a low rank", svg, "No dictionary is needed for this."))
        excesses = {sae: excess(result, sae) for sae in result.tables["dictionaries"]["sae"]}
        rows = [figures.Row(sae, *e[:3], "atom") for sae, e in excesses.items() if e is not None]
        if rows:
            svg = figures.intervals(rows, "share of firings, above chance", f"Own tokens: {name}")
            caption = "Median over atoms, above as many random positions."
            panels.append(Figure("Firings at an atom's own token", svg, caption))
        return panels

    def notes(self, result: Result) -> list[str]:
        """What is written at which size, and what the measures are worth."""
        size = (
            "All that is written has the norm of the native write, so that only directions differ."
            if self.scale == "matched"
            else "Dictionaries and projections write at their own size; directions without one (random, mean, state) "
            "get the projection of the native write on them, which is the best they can do."
        )
        table = result.tables["writes"]
        silent = int(((table["condition"] == ATOM) & (table["norm"] == 0)).sum())
        quiet = [f"At {silent} positions no atom fires, and nothing is written: that is no win."] if silent else []
        worth = "Perplexity of whole replacement and selectivity are reported for completeness: both say little."
        return [size, *quiet, worth]


# ---------------------------------------------------------------------------------------------- reading a result


def kl(result: Result, condition: str, sae: str = "") -> pd.Series:
    """KL by (sequence, position), in one order for all conditions."""
    table = result.tables["writes"]
    rows = table[(table["condition"] == condition) & (table["sae"] == sae)]
    return rows.set_index(["sequence", "position"])["kl"].sort_index()


def win_rate(result: Result, condition: Condition, minus: Condition | None = None) -> Estimate:
    """Share of positions at which a condition is nearer to the native model than deletion, over sequences; with `minus`
    the paired difference of two shares."""

    def wins(each: Condition) -> pd.Series:
        return (kl(result, *each) < kl(result, "delete")).astype(float)

    values = wins(condition)
    clusters = values.index.get_level_values("sequence")
    if minus is None:
        return success_rate(values, clusters).over_clusters
    return estimate(values - wins(minus), clusters, seed=result.evaluation.seed)


def cost(result: Result, method: Condition, minus: Condition | None = None, hook: str | None = None) -> Estimate:
    """Nats per token that a method (with the label of its dictionary) costs, over sequences; with `minus` the paired
    difference. Its observations are tokens.

    Args:
        hook: what is replaced; None: the dictionaries' own target.
    """
    table = result.tables["replacement"]
    table = table[table["hook"] == (hook or result.info["target"])]

    def nats(each: Condition) -> pd.Series:
        rows = table[(table["method"] == each[0]) & (table["sae"] == each[1])]
        return rows.set_index("sequence")["nats"].sort_index()

    values = nats(method) if minus is None else nats(method) - nats(minus)
    over_sequences = estimate(values, values.index, seed=result.evaluation.seed)
    return over_sequences._replace(n=over_sequences.n * int(result.fact("n_positions")))


def no_op_cost(result: Result) -> float:
    """What replacing all matrices by themselves costs: the floor, in nats per token (95th percentile)."""
    table = result.tables["replacement"]
    return float(table.loc[table["method"] == "itself", "nats"].abs().quantile(0.95))


def excess(result: Result, sae: str) -> Estimate | None:
    """Median over atoms of (share of the own token - chance); None where fewer than two atoms were measured."""
    table = result.tables["own_tokens"]
    rows = table[table["sae"] == sae]
    if len(rows) < 2:
        return None
    values = rows["share"] - rows["chance"]
    return estimate(values, rows["atom"], statistic=weighted_median, seed=result.evaluation.seed)


def of_variant(result: Result, name: str) -> pd.Series | None:
    """The row of the first dictionary of a variant."""
    table = result.tables["dictionaries"]
    return _first(table[table["variant"] == name])


def perplexity(nats: Estimate) -> str:
    """A cost in nats per token as a change of perplexity, with its interval."""
    mean, low, high = _percent_perplexity(nats)
    return f"{mean:+.3g}\u00a0% [{low:+.3g}, {high:+.3g}]"


def _percent_perplexity(nats: Estimate) -> tuple[float, float, float]:
    return 100 * math.expm1(nats.mean), 100 * math.expm1(nats.low), 100 * math.expm1(nats.high)


def _points(gap: Estimate) -> str:
    return f"{100 * gap.mean:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}] points"


def _over_half(rate: Estimate) -> Estimate:
    """A win rate as a distance from 1/2, so that chance is 0."""
    return rate._replace(mean=rate.mean - 0.5, low=rate.low - 0.5, high=rate.high - 0.5)


def _more_dead(a: pd.Series, b: pd.Series, seed: int) -> Estimate:
    """Share of dead atoms of `a` minus that of `b`."""
    dead = [np.arange(row["d_sae"]) < row["dead"] for row in (a, b)]
    return estimate_difference(*dead, *(np.arange(len(each)) for each in dead), seed=seed)


def _first(table: pd.DataFrame) -> pd.Series | None:
    return None if table.empty else table.iloc[0]


def _untested(number: int | None, claim: str, need: str) -> Claim:
    return Claim(number, claim, "–", 0, "dictionaries", "", "not tested", need)


def _name(condition: str) -> str:
    head, _, rank = condition.partition(" ")
    return f"{rank} principal component{'s' * (rank != '1')}" if head == "pca" else NAMES.get(condition, condition)


def _wins(result: Result) -> list[figures.Row]:
    pairs = result.tables["writes"][["sae", "condition"]].drop_duplicates()
    rows = []
    for sae, condition in pairs[~pairs["condition"].isin(["native", "delete"])].itertuples(index=False):
        name = f"{sae}: {CONDITIONS[condition]}" if sae else _name(condition)
        rows.append(figures.Row(name, *win_rate(result, (condition, sae))[:3], _COLOURS.get(condition, "control")))
    return rows


def _costs(result: Result) -> list[figures.Row]:
    table = result.tables["replacement"]
    pairs = table.loc[table["hook"] == result.info["target"], ["sae", "method"]].drop_duplicates()
    pairs = pairs[~pairs["method"].str.startswith("rank ")].sort_values("sae", key=lambda x: x != "", kind="stable")
    return [
        _cost_row(sae or _name(method), cost(result, (method, sae)), "atom" if sae else "control")
        for sae, method in pairs.itertuples(index=False)
    ]


def _cost_row(name: str, nats: Estimate, colour: str) -> figures.Row:
    return figures.Row(name, *_percent_perplexity(nats), colour)
