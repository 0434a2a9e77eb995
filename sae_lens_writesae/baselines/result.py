"""What the baselines found: tables, and how a number of them is read off."""

from __future__ import annotations

from typing import Any, ClassVar

import pandas as pd

from sae_lens_writesae.baselines.writes import ATOM
from sae_lens_writesae.evaluation import Claim, Evaluation, Figure
from sae_lens_writesae.interventions.common import Estimate, estimate
from sae_lens_writesae.verdict import statistics as stats

DICTIONARY_FREE = ("random", "mean", "state")
"""Controls beside the principal components, which need no dictionary either."""


class Baselines(Evaluation):
    """Dictionaries of one head that differ in architecture, beside what needs no dictionary.

    **Substitution.** At positions drawn uniformly, the same for all, the write gives way to: the dictionary's strongest
    atom by |a_i| |A_i| (`atom`; cut to rank 1 where it is not, `atom svd`); the top-1 SVD of its reconstruction
    (`svd`: for a FlatSAE the paper's baseline); a random direction, the head's mean write, the top singular direction
    of the state before the write (that of the state after it is a reference, which confounds nothing), and the write's
    projection on the first principal components of writes (`pca r`). A win: KL(native || patched), mean over
    t..t+horizon, is smaller than after deletion. Differences are paired.

    **Whole-matrix replacement.** Every write (state) of the head gives way to its reconstruction at once; the cost is
    in nats per token, and as perplexity exp(cost) - 1. Beside it the mean matrix, zero, `pca r`, and the states cut to
    rank r.

    **Selectivity** of an atom: the share of its most frequent token among its firings, minus the same share for as many
    positions drawn at random. (The paper names no formula.)

    Intervals are over sequences; over atoms for dead atoms and selectivity. The WriteSAE is the first dictionary with
    rank-1 atoms and a bilinear encoder, the FlatSAE the first dense one of the same size.

    * Claim 15, it substitutes better than a flat SAE with a top-1 SVD, like for like: its strongest atom against the
      flat SAE's cut to rank 1, and the top-1 SVD of its reconstruction against that of the flat one's. "below the
      floor" where deletion moves the model by no more than a no-op; "fails" where the interval of the difference of win
      rates does not lie above 0; "confounded" where something that needs no dictionary beats deletion, too, and it does
      not beat that (an atom is held against the first `pca_ranks` alone, a code against all); else "holds". The second
      comparison is also made with the FlatSAE that has as many parameters (within 5 %).
    * Claim 16, rank-2 atoms cost no more perplexity: "below the floor" where replacing all by zero costs nothing;
      "fails" where the interval of cost(rank 2) - cost(rank 1) lies above 0; "confounded" where the mean matrix costs
      no more than rank-2 atoms do; else "holds". Atoms of rank 4, where there are any, by the same rule.
    * Claim 17, fewer dead atoms than the FlatSAE: "fails" where the interval of the difference of shares does not lie
      above 0; "confounded" where a dense encoder with rank-1 atoms (MatrixSAE) leaves as few dead; else "holds".
    * States cut to rank 1 cost less than 0.1 % of perplexity: "holds" where the interval's end is below that (the
      metric then says little of dictionaries), "below the floor" where zero states cost nothing, else "fails".
    * Atoms are selective: "fails" where the interval of the median excess does not lie above 0; "confounded" where the
      FlatSAE's atoms are as selective; else "holds".

    Where there are fewer than 20 observations or 5 clusters, or the interval of a difference of win rates contains both
    0 and 10 points, a claim that would be judged by chance is "inconclusive".
    """

    kind: ClassVar[str] = "baselines"
    title: ClassVar[str] = "Do rank-1 atoms do better than what is simpler?"
    COLUMNS: ClassVar[dict[str, dict[str, str]]] = {
        "dictionaries": {
            "sae": "label of the dictionary",
            "variant": "of the paper's variants, or other",
            "d_sae": "atoms",
            "parameters": "numbers that are trained",
            "explained": "share of variance of its target",
            "l0": "atoms active per token",
            "alive": "atoms that fire",
            "dead": "atoms that never fire",
        },
        "writes": {
            "sequence": "row of the evaluation tokens",
            "position": "token t that is edited",
            "sae": "label of the dictionary; empty where none is needed",
            "condition": "native, delete, random, mean, state, state_after, pca r; atom, atom svd, svd",
            "kl": "nats, mean over t..t+horizon",
            "cosine": "of what is written with the native write",
            "norm": "of what is written over the native norm",
        },
        "replacement": {
            "sequence": "row of the evaluation tokens",
            "sae": "label of the dictionary; empty where none is needed",
            "hook": "what is replaced: write or state",
            "method": "itself, dictionary, mean, zero, pca r; for states rank r",
            "nats": "per token, more than without replacement",
            "native_nats": "per token, without replacement",
        },
        "selectivity": {
            "sae": "label of the dictionary",
            "atom": "atom that fires often enough",
            "firings": "its firings",
            "token": "the most frequent token among them",
            "share": "its share",
            "chance": "the same for as many random positions",
        },
    }

    def wins(self, condition: str, sae: str = "") -> pd.Series:
        """Whether it is nearer to the native model than deletion, by (sequence, position)."""
        return (self.kl(condition, sae) < self.kl("delete")).astype(float)

    def kl(self, condition: str, sae: str = "") -> pd.Series:
        """KL by (sequence, position), in one order for all."""
        table: Any = self.tables["writes"]
        own = table[(table["condition"] == condition) & (table["sae"] == sae)]
        return own.set_index(["sequence", "position"])["kl"].sort_index()

    def win_rate(self, condition: str, sae: str = "", minus: tuple[str, str] | None = None) -> Estimate:
        """Over sequences; with `minus` (condition, sae) the paired difference."""
        values = self.wins(condition, sae) - (self.wins(*minus) if minus else 0.0)
        return estimate(values, values.index.get_level_values("sequence"), self.info["config"]["seed"])

    def cost(self, method: str, sae: str = "", hook: str = "", minus: tuple[str, str] | None = None) -> Estimate:
        """Nats per token by sequence; `hook` by default the dictionaries' own; with `minus` (method, sae) paired."""
        values = self._nats(method, sae, hook) - (self._nats(*minus, hook) if minus else 0.0)
        return estimate(values, values.index, self.info["config"]["seed"])

    def _nats(self, method: str, sae: str, hook: str) -> pd.Series:
        table: Any = self.tables["replacement"]
        own = (table["method"] == method) & (table["sae"] == sae) & (table["hook"] == (hook or self.info["target"]))
        return table[own].set_index("sequence")["nats"].sort_index()

    def excess(self, sae: str) -> stats.Bootstrap | None:
        """Median over atoms of (selectivity - chance); None where fewer than two atoms were measured."""
        table: Any = self.tables["selectivity"]
        own = table[table["sae"] == sae]
        if len(own) < 2:
            return None
        values = own["share"] - own["chance"]
        return stats.cluster_bootstrap(values, own["atom"], stats.weighted_median, seed=self.info["config"]["seed"])

    def free(self, *, all_components: bool = False) -> list[str]:
        """Conditions that need no dictionary: the controls, and the first of `pca_ranks` (or all)."""
        ranks = self.info["config"]["pca_ranks"]
        return [*DICTIONARY_FREE, *(f"pca {r}" for r in (ranks if all_components else ranks[:1]))]

    def conditions(self, sae: str) -> list[str]:
        """Conditions of a dictionary, in the order of the table."""
        table: Any = self.tables["writes"]
        return list(dict.fromkeys(table.loc[table["sae"] == sae, "condition"]))

    def of_variant(self, *variants: str) -> dict[str, Any] | None:
        """The row of the first dictionary of a variant."""
        table: Any = self.tables["dictionaries"]
        found = table[table["variant"].isin(variants)]
        return None if found.empty else found.iloc[0].to_dict()

    def claims(self) -> list[Claim]:
        """Claims 15 to 17, parameters, the metric of whole replacement, selectivity."""
        from sae_lens_writesae.baselines.claims import claims

        return claims(self)

    def figures(self) -> list[Figure]:
        """Win rates, costs of replacement, dead atoms and reconstruction, selectivity."""
        from sae_lens_writesae.baselines.plots import figures

        return figures(self)

    def notes(self) -> list[str]:
        """What is written at which size, and what the measures are worth."""
        size = (
            "All that is written has the norm of the native write, so that directions alone differ."
            if self.info["config"]["scale"] == "matched"
            else "Dictionaries and projections write at their own size; directions without one (random, mean, state) "
            "get the projection of the native write on them, which is the best they can do."
        )
        table: Any = self.tables["writes"]
        silent = int(((table["condition"] == ATOM) & (table["norm"] == 0)).sum())
        quiet = [f"At {silent} positions no atom fires, and nothing is written: that is no win."] if silent else []
        worth = "Perplexity of whole replacement and selectivity are reported for completeness: both say little."
        return [size, *quiet, worth, *super().notes()]
