"""Settings and result of passages without a class of atoms (`passage`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from sae_lens_writesae.evaluation import Claim, Evaluation, Figure
from sae_lens_writesae.interventions import plots
from sae_lens_writesae.interventions.common import Estimate, check_at_least, estimate
from sae_lens_writesae.verdict.judge import NO_DATA, too_little

CONTROLS = ("own", "removed", "inserted", "random")
_NAMES = {
    "deleted": "the class's atoms taken away",
    "own": "same norm of the same writes taken away",
    "removed": "same norm of other writes taken away",
    "inserted": "other writes put in",
    "random": "random directions put in",
}
_SHORT = {
    "deleted": "class taken away",
    "own": "same writes, less",
    "removed": "others taken away",
    "inserted": "others put in",
    "random": "random put in",
}
"""Names that leave room for the axis of a figure."""
_FLOOR_BITS = 1e-6


@dataclass(frozen=True)
class PassageConfig:
    """Which passages, which classes."""

    passages: int = 20
    """Sequences of the test half whose NLL is measured; fewer where there are fewer."""
    classes: Mapping[str, Sequence[int]] | None = None
    """Atoms by the name of their class. None: `register` and `bundle`, by whether the median signed cosine with the
    native write over an atom's firings, on the other half of the sequences, reaches `threshold`."""
    threshold: float = 0.05
    """The rule between register and bundle."""
    min_firings: int = 4
    """Firings on the other half that an atom needs to be given a class."""
    rows_per_run: int = 16
    """Edited passages at once."""
    seed: int = 0
    """Of the split and the controls."""
    label: str = ""
    """Name in reports."""

    def __post_init__(self) -> None:
        check_at_least(self, {"passages": 2, "min_firings": 1, "rows_per_run": 1})
        if self.classes is not None:
            made = {str(name): tuple(int(i) for i in atoms) for name, atoms in self.classes.items()}
            object.__setattr__(self, "classes", made)
            if not made or not all(made.values()):
                raise ValueError(f"classes map names to lists of atoms, none of them empty, found {made}")


class Passage(Evaluation):
    """Bits per token that passages lose when every firing of a class of atoms is taken away.

    Definition: at each token t where atoms of the class fire the write becomes W_t - sum_i a_i A_i, i over the class's
    atoms; measured is the mean over the passage of -log2 p(next token), minus the same without edits.

    Controls, with c_t = |sum_i a_i A_i| at each of those tokens: `own`, c_t taken from the write that is there;
    `removed`, the same norms taken from the writes of as many random tokens; `inserted`, the writes of random other
    tokens put in at norm c_t; `random`, Gaussian rank-1 directions put in at norm c_t (the paper's).

    Verdict of claim 19, for the class `register` (or the first), by passage (bootstrap over passages):
    1. "below the floor": all costs are below 1e-6 bits.
    2. "inconclusive" with too little data (`verdict.judge`); else "fails":
       the interval of cost(deleted) - cost(random) does not lie below 0.
    3. "confounded": random directions cost more, but other writes taken away (`removed`) do not: what counts is taking
       away against putting in, not which writes.
    4. "holds" otherwise.
    """

    kind: ClassVar[str] = "passage"
    title: ClassVar[str] = "Do passages bear the loss of a class of atoms?"
    COLUMNS: ClassVar[dict[str, dict[str, str]]] = {
        "passages": {
            "sequence": "test sequence",
            "class": "name of the class",
            "condition": "deleted, own, removed, inserted, random",
            "bits": "bits per token, minus those of the unedited passage",
            "native_bits": "bits per token of the unedited passage",
            "tokens_edited": "tokens whose write was changed",
            "norm": "mean norm of the change, in norms of the native write at the same token of the class",
        },
        "classes": {"class": "name", "atom": "index in the dictionary"},
    }

    def cost(self, name: str, condition: str, minus: str | None = None) -> Estimate:
        """Bits per token, by passage; with `minus` the paired difference."""
        table: Any = self.tables["passages"]
        own = table[table["class"] == name].pivot(index="sequence", columns="condition", values="bits")
        values = own[condition] - (own[minus] if minus else 0.0)
        return estimate(values, own.index.to_numpy())

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order given."""
        return list(dict.fromkeys(self.tables["passages"]["class"]))

    def claims(self) -> list[Claim]:
        """Claim 19 for registers, then the other classes."""
        names = self.classes
        first = "register" if "register" in names else names[0]
        return [self._claim(name, 19 if name == first else None) for name in [first, *(n for n in names if n != first)]]

    def _claim(self, name: str, number: int | None) -> Claim:
        table: Any = self.tables["passages"]
        costs = {condition: self.cost(name, condition) for condition in ("deleted", *CONTROLS)}
        to_random, to_removed = (self.cost(name, "deleted", c) for c in ("random", "removed"))
        if max(abs(e.mean) for e in costs.values()) < _FLOOR_BITS:
            outcome, why = "below the floor", "Nothing that was done to the writes costs anything."
        elif too_little(to_random.n, to_random.n_clusters, to_random.low, to_random.high):
            outcome, why = "inconclusive", NO_DATA
        elif not to_random.high < 0:
            outcome, why = "fails", "Taking the atoms away costs no less than random writes of the same norm."
        elif not to_removed.high < 0:
            outcome, why = (
                "confounded",
                "Taking the same norm from other writes costs as little: putting in is what hurts.",
            )
        else:
            outcome, why = "holds", "Taking the atoms away costs less than random writes put in, or others taken away."
        members: Any = self.tables["classes"]
        n = int((members["class"] == name).sum())
        edited = table[(table["class"] == name) & (table["condition"] == "deleted")]["tokens_edited"].mean()
        return Claim(
            number,
            f"passages bear the deletion of class {name} ({n} atoms, {edited:.0f} tokens a passage)",
            f"{costs['deleted']} bits per token",
            costs["deleted"].n,
            "passages",
            "; ".join(f"{_NAMES[c]} {costs[c]}" for c in CONTROLS),
            outcome,
            why,
        )

    def figures(self) -> list[Figure]:
        """Costs, one figure a class."""
        made = []
        colours = {"deleted": "atom", "own": "soft", "removed": "rival", "inserted": "soft", "random": "soft"}
        for name in self.classes:
            rows = [plots.Row(_SHORT[c], *self.cost(name, c)[:3], colours[c]) for c in ("deleted", *CONTROLS)]
            svg = plots.interval_figure(rows, "bits per token", f"Costs, class {name}, passage: {self.label}")
            made.append(Figure(f"Class {name}", svg, "Mean over passages with 95 % intervals."))
        return made
