"""Baselines: what a WriteSAE is to be compared with, other architectures and directions that need no dictionary.

Source: WriteSAE (arXiv 2605.12770), its comparisons of architectures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import pandas as pd
from annotated_types import Ge
from pydantic import NonNegativeInt, PositiveInt

from writesae.experiment.lab import Site
from writesae.head.matrices import matrices_of
from writesae.page.format import percent
from writesae_study.dictionary.replacement import (
    ATOM,
    ATOM_SVD,
    DICTIONARIES,
    EXCHANGED,
    REPLACEMENT,
    SVD,
    Basis,
    dictionaries,
    exchanged,
    mean_cost,
    no_op_cost,
    of_dictionary,
    replacement_costs,
)
from writesae_study.dictionary.selectivity import SELECTIVITY, direction_selectivity
from writesae_study.experiment.bench import Bench
from writesae_study.experiment.draws import halves
from writesae_study.experiment.evaluation import Evaluation, Result, Scope
from writesae_study.verdict.finding import Against, Finding, Paired, with_interval
from writesae_study.verdict.names import NAMES, shown_name
from writesae_study.verdict.notation import perplexity, points

DICTIONARY_FREE = ("random", "mean", "state")
"""Controls that need no dictionary, other than the principal components."""

RELEVANT = 0.1
"""Difference of two shares (win rates, dead atoms) from which on it matters, and margin by which
a control may be worse and still count as equal."""
SMALL_COST = math.log1p(0.001)
"""Nats per token, 0.1% of perplexity, below which a cost does not matter (the paper's "negligible")."""
RELEVANT_SELECTIVITY = 0.01
"""Difference of two selectivities that matters. The paper's 47 heads lie between 0.96 and 1."""
SAME_SIZE = 0.05
"""Largest relative difference of two numbers of parameters that counts as the same number."""


@dataclass(frozen=True, kw_only=True)
class Baselines(Evaluation):
    """Dictionaries of one head that differ in architecture, and rivals that need no dictionary. Means and principal
    components come from one half of the sequences, tests from the other.

    **Substitution.** At positions drawn uniformly, the same for all, the native write is replaced by: the dictionary's
    strongest atom by |a_i| |A_i| (`atom`; cut to rank 1 where it is of a higher rank, `atom svd`); the top-1 SVD of its
    reconstruction (`svd`: for a FlatSAE the paper's baseline); a random direction; the head's mean write; the top
    singular direction of the state before the write (that of the state after it contains the write: a reference, never
    compared with an atom); and the projection of the write on the first principal components of writes (`pca r`). A
    direction without a size gets the projection of the native write on it, its best. A
    win: the KL divergence from the native distributions, mean over t..t+horizon, is smaller than after deletion.
    Differences of win rates are paired.

    **Whole-matrix replacement.** Every write (state) of the head is replaced by its reconstruction at once. The cost is
    in nats per token, and as perplexity exp(cost) - 1. Others are the mean matrix and zero. Replacing all by itself is
    the no-op that measures the floor.

    **Selectivity** of a direction (the paper's, I.1): 1 - overlap of the `top_tokens` tokens that the strongest atom
    moves most, where it is added to the write at the write's norm, with those that a random direction moves there.

    The WriteSAE is the first dictionary with rank-1 atoms and a bilinear encoder, the FlatSAE the first dense one with
    as many atoms (or, once more, as many parameters within 5%). Intervals are over sequences, and over atoms for dead
    atoms. Claims are about the first dictionary of each variant; others of its seeds are in the tables.

    **Verdicts** by the ladder of `judge`:

    * Claim 15, a WriteSAE substitutes better than a flat SAE with a top-1 SVD, like for like: strongest atom against
      the flat SAE's atom cut to rank 1, and top-1 SVD of the reconstruction against that of the flat one. The effect is
      the difference of win rates (10 points matter), against everything that needs no dictionary: an atom against the
      smallest of `pca_ranks` alone, a reconstruction against all of them.
    * Claim 16, rank-2 atoms cost no more perplexity: the interval of cost(rank 2) - cost(rank 1) ends below 0.1% of
      perplexity, against the mean matrix; below the floor where replacing all by zero costs nothing.
    * Claim 17, fewer dead atoms than the FlatSAE: the difference of shares (10 points matter), against a dense encoder
      with rank-1 atoms (MatrixSAE), where there is one. A bilinear encoder with flat atoms is shown and is no control.
    * Claim 28, an atom moves other tokens than a random direction: the ladder on its selectivity minus that of a second
      random direction (0.01 matters). The paper finds no difference from directions without meaning.
    """

    test_sequences: Annotated[int, Ge(2)] = 40
    """Sequences of the test half on which writes are exchanged (all, if fewer)."""
    positions_per_sequence: PositiveInt = 2
    """Positions of each, drawn uniformly; every dictionary and every control writes at the same ones."""
    pca_ranks: tuple[PositiveInt, ...] = (1, 4, 32)
    """Numbers of principal components of the head's writes."""
    pca_writes: Annotated[int, Ge(2)] = 1024
    """Writes that the components are fitted to, drawn from the other half."""
    replacement_sequences: Annotated[int, Ge(2)] = 16
    """Sequences of the test half on which whole matrices are replaced."""
    horizon: PositiveInt = 16
    """KL is averaged over t..t+horizon, both included."""
    first_position: NonNegativeInt = 1
    """Positions before this one are not drawn."""
    top_tokens: PositiveInt = 32
    """Tokens that are compared for the selectivity of directions (the paper's K)."""

    scope: ClassVar[Scope] = Scope.VARIANTS
    columns: ClassVar[dict[str, dict[str, str]]] = {
        "dictionaries": DICTIONARIES,
        "writes": EXCHANGED,
        "replacement": REPLACEMENT,
        "selectivity": SELECTIVITY,
    }

    # -- measuring

    def measure(self, lab: Bench) -> dict[str, pd.DataFrame]:
        # Means and components from one half of the sequences, tests on the other.
        split = halves(len(lab.tokens), self.seed)
        basis = Basis.fit(lab, split.select.tolist(), self.pca_writes, max(self.pca_ranks))
        tested = split.test[: self.test_sequences]
        written, directions = [], []
        for site in lab.sites(pd.DataFrame({"sequence": tested}), "writes"):
            positions = self._drawn_positions(lab, site)
            n_lacking = self.positions_per_sequence - len(positions)
            lab.skipped["positions with a zero native write, or no room for the window"] += n_lacking
            if not positions:
                continue
            written.append(exchanged(lab, site, positions, basis, self.pca_ranks, self.horizon + 1))
            native = site.at(positions)
            # The strongest atom of each dictionary, for the selectivity of directions.
            atoms = {}
            for label, hook in lab.hooks.items():
                matrices = matrices_of(site.recurrence, hook.target)[positions]
                atoms[label] = of_dictionary(lab, label, matrices, native)[ATOM]
            directions.append(direction_selectivity(lab, site, positions, atoms, self.top_tokens))
        lab.require(len(written) > 1, "the head writes nothing at the drawn positions of all but one sequence")
        # Whole sequences whose writes or states are replaced at once.
        costs = [
            replacement_costs(lab, sequence, basis)
            for sequence in lab.bar(split.test[: self.replacement_sequences].tolist(), "replacement")
        ]
        lab.facts["d_vocab"] = int(lab.model.cfg.d_vocab)
        return {
            "dictionaries": dictionaries(lab),
            "writes": pd.concat(written, ignore_index=True),
            "replacement": pd.concat(costs, ignore_index=True),
            "selectivity": pd.concat(directions, ignore_index=True),
        }

    def _drawn_positions(self, lab: Bench, site: Site) -> list[int]:
        """A uniform draw of the positions with a write that leave room for the window, in order."""
        written = np.flatnonzero((site.writes.norm() > 0).cpu().numpy())
        stop = len(site.writes) - self.horizon
        able = written[(written >= self.first_position) & (written < stop)]
        count = min(self.positions_per_sequence, len(able))
        drawn = lab.rng(9, site.sequence).choice(able, count, replace=False)
        return sorted(drawn.tolist())

    # -- judging

    def findings(self, result: Result) -> list[Finding]:
        """Claims 15 to 17, and 28."""
        table = result.tables["dictionaries"]
        same = near = None
        writes = result.tables["writes"]
        # "dictionary/condition": a condition that needs no dictionary begins with the slash.
        named = writes.assign(name=writes["sae"] + "/" + writes["condition"])
        kl = Paired.of(named, "kl", "sequence", "position", by="name", seed=self.seed)
        ours = _first_row(table, variant="WriteSAE")
        # The rivals of the WriteSAE: a flat SAE with as many atoms, and one with as many parameters.
        if ours is not None:
            same = _first_row(table, variant="FlatSAE", d_sae=ours["d_sae"])
            size = table["parameters"] / ours["parameters"]
            near = _first_row(table[(size - 1).abs() <= SAME_SIZE], variant="FlatSAE")
        return [
            self._against_flat(kl, ours, same, "as many atoms", (ATOM, ATOM_SVD)),
            self._against_flat(kl, ours, same, "as many atoms", (SVD, SVD)),
            self._against_flat(kl, ours, near, "as many parameters", (SVD, SVD)),
            self._higher_rank(result, ours),
            self._dead_atoms_finding(result, ours, same),
            self._selectivity_finding(result, ours),
        ]

    def _against_flat(
        self, kl: Paired, ours: pd.Series | None, flat: pd.Series | None, size: str, conditions: tuple[str, str]
    ) -> Finding:
        """`conditions`: what the WriteSAE writes, and what the flat SAE writes."""
        what, ranks = "a code", self.pca_ranks
        if conditions[0] == ATOM:  # an atom is one matrix of low rank, as few components are
            what = "an atom"
            ranks = (min(self.pca_ranks),)
        claim = f"{what} of the WriteSAE substitutes better than the top-1 SVD of {what} of a flat SAE with {size}"
        number = 15 if size == "as many atoms" else None
        if ours is None or flat is None:
            match = ": `matched_flat` says how many atoms that is" if size == "as many parameters" else ""
            return Finding.untested(claim, f"It needs a WriteSAE and a FlatSAE with {size}{match}.", number)
        mine = f"{ours['sae']}/{conditions[0]}"
        theirs = f"{flat['sae']}/{conditions[1]}"
        written = [column for column in map(str, kl.wide) if "/" in column]  # the others say which position
        nearer = {column: kl[column] < kl["/delete"] for column in written}
        wins = Paired(kl.wide.assign(**nearer), seed=self.seed)
        gap = wins.mean(mine, theirs)
        components = [f"pca {rank}" for rank in ranks]
        free = {f"/{name}": shown_name(name) for name in (*DICTIONARY_FREE, *components)}
        against = {}
        for column, shown in free.items():
            above_chance = wins.mean(column).beyond(0.5)
            against[shown] = Against(wins.mean(mine, column), above_chance)
        return Finding(
            number=number,
            claim=claim,
            effect=gap,
            what="the difference of win rates",
            null="FlatSAE",
            against=against,
            relevant=RELEVANT,
            **kl.size_of("/delete", "/native"),
            shown=wins.means({mine: "WriteSAE", theirs: "flat SAE"} | free | {"/state_after": NAMES["state_after"]}),
            write=percent,
            axis="of positions nearer to the native model than after deletion",
            measured=f"difference {with_interval(gap, points)} points",
            of="positions in {} sequences",
        )

    def _higher_rank(self, result: Result, ours: pd.Series | None) -> Finding:
        claim = "rank-2 atoms cost no more perplexity than rank-1 atoms"
        rank_2 = _first_row(result.tables["dictionaries"], variant="WriteSAE-rank2")
        if ours is None or rank_2 is None:
            return Finding.untested(claim, "It needs a WriteSAE and one with atoms of rank 2 (WriteSAE-rank2).", 16)
        high = f"{rank_2['sae']}/dictionary"
        low = f"{ours['sae']}/dictionary"
        names = {high: "rank 2", low: "rank 1", "/mean": "mean matrix", "/zero": "zero"}
        shown = {shown: mean_cost(result, method) for method, shown in names.items()}
        gap = mean_cost(result, high, low)
        return Finding(
            number=16,
            claim=claim,
            effect=gap,
            what="the difference of costs",
            null="mean matrix",
            against={"mean matrix": Against(mean_cost(result, high, "/mean"))},
            typical=shown["zero"].low,
            floor=no_op_cost(result),
            chance=2 * SMALL_COST,  # so that the cost must be below SMALL_COST
            less=True,
            relevant=SMALL_COST,
            shown=shown,
            write=perplexity,
            axis="of perplexity at rank 2",
            measured=f"difference {with_interval(gap, perplexity)}",
            n=gap.n_clusters,
            of="sequences",
        )

    def _dead_atoms_finding(self, result: Result, ours: pd.Series | None, flat: pd.Series | None) -> Finding:
        claim = "the bilinear encoder leaves fewer atoms dead"
        if ours is None or flat is None:
            return Finding.untested(claim, "It needs a WriteSAE and a FlatSAE with as many atoms.", 17)
        rivals = {"WriteSAE": ours, "FlatSAE": flat}
        halfway = {
            "a dense encoder with rank-1 atoms": "MatrixSAE",
            "a bilinear encoder with flat atoms": "BilinearFlatSAE",  # has the encoder of the claim: no control
        }
        for name, variant in halfway.items():
            row = _first_row(result.tables["dictionaries"], variant=variant, d_sae=ours["d_sae"])
            if row is not None:
                rivals[name] = row
        dead = {}
        for name, row in rivals.items():
            is_dead = np.arange(row["d_sae"]) < row["dead"]  # intervals resample atoms, and only their number is known
            dead[name] = Paired(pd.DataFrame({"dead": is_dead}).reset_index(), ("index",), self.seed)
        gap = {name: atoms.lead("dead", dead["WriteSAE"]) for name, atoms in dead.items()}
        dense = {name: Against(lead) for name, lead in gap.items() if name.startswith("a dense")}
        return Finding(
            number=17,
            claim=claim,
            effect=gap["FlatSAE"],
            what="the difference of the shares of dead atoms",
            against=dense,
            relevant=RELEVANT,
            null="FlatSAE",
            shown={name: atoms.mean("dead") for name, atoms in dead.items()},
            write=percent,
            axis="of atoms dead",
            measured=f"difference {with_interval(gap['FlatSAE'], points)} points",
            controls="" if dense else "a dense encoder with rank-1 atoms (MatrixSAE) was not given",
            of="atoms",
        )

    def _selectivity_finding(self, result: Result, ours: pd.Series | None) -> Finding:
        claim = "an atom moves other tokens than a random direction of its norm"
        table = result.tables["selectivity"]
        of_ours = table[table["sae"] == (None if ours is None else ours["sae"])]
        if len(of_ours) < 2:
            return Finding.untested(claim, "It needs a WriteSAE whose atoms fire at two positions or more.", 28)
        moved = Paired(of_ours, seed=self.seed)
        lead = moved.mean("selectivity", "chance")
        of_random_sets = 1 - self.top_tokens / result.fact("d_vocab")
        return Finding(
            number=28,
            claim=claim,
            effect=lead,
            what="the lead over a direction without meaning",
            relevant=RELEVANT_SELECTIVITY,
            null="a second random direction",
            shown=moved.means({"selectivity": "atom", "chance": "a second random direction"}),
            write="{:.4f}".format,
            axis=f"selectivity at K = {self.top_tokens}",
            measured=f"lead {with_interval(lead)}",
            controls=f"two random sets of tokens {of_random_sets:.4f}",
            of="positions in {} sequences",
        )


def _first_row(table: pd.DataFrame, **values: object) -> pd.Series | None:
    """The first row that has these values."""
    rows = table[(table[list(values)] == list(values.values())).all(axis=1)]
    return None if rows.empty else rows.iloc[0]
