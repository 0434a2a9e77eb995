"""Settings and result of the search for readers (`readers`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from sae_lens_writesae.evaluation import Claim, Evaluation, Figure
from sae_lens_writesae.interventions import plots
from sae_lens_writesae.interventions.common import Estimate, check_at_least, estimate_over_atoms
from sae_lens_writesae.later_heads import head_name
from sae_lens_writesae.verdict.judge import NO_DATA, too_little

CONDITIONS = ("atom", "random", "other")
_FLOOR = 1e-6
"""Relative change. Float32 reads of the same arithmetic agree to less than that."""
_HEAD = ["layer", "mixer", "head"]
_SHOWN = 12
"""Heads in the figure."""


@dataclass(frozen=True)
class ReadersConfig:
    """Which firings, and for how long later heads are watched."""

    n_atoms: int | None = 16
    """Atoms drawn uniformly from those that fire often enough in both halves. None: all of them."""
    atoms: tuple[int, ...] | None = None
    """A hand-picked list (at least two) instead of a draw."""
    select_firings: int = 8
    """At most so many firings of an atom for the choice of its reader, dealt over sequences."""
    test_firings: int = 8
    """At most so many for the test, in the other half of the sequences."""
    min_firings: int = 4
    """Firings in each half that an atom needs."""
    horizon: int = 8
    """What later heads give is compared over t..t+horizon."""
    first_position: int = 1
    """Firings before this token are left out."""
    rows_per_run: int = 256
    """Edited rows at once; does not change results."""
    seed: int = 0
    """Of the split, the draw and the controls."""
    label: str = ""
    """Name in reports."""

    def __post_init__(self) -> None:
        least: dict[str, float] = {"n_atoms": 2, "select_firings": 1, "test_firings": 2, "min_firings": 2, "horizon": 0}
        check_at_least(self, least | {"first_position": 0, "rows_per_run": 1})
        if self.atoms is not None:
            object.__setattr__(self, "atoms", tuple(int(i) for i in self.atoms))
            if len(set(self.atoms)) != len(self.atoms) or len(self.atoms) < 2:
                raise ValueError(f"atoms needs at least two atoms, named once each, found {list(self.atoms)}")


class Readers(Evaluation):
    """Which later heads notice that an atom's write is gone.

    Definition: at a firing (t, i) the write becomes W_t - a_i A_i. What a head gives is its reads (`hook_read`), or for
    an attention head its mix of values (`hook_z`). The change of a head of a later layer is the norm of the change of
    what it gives over t..t+horizon, over the norm of that. Heads of the same layer or below cannot change and are not
    listed; nor are tokens before t. An atom's reader is the head with the largest mean
    log ratio of its change to that under a random direction, over the firings of the selection half of the
    sequences; what follows is measured on the other half.

    Controls at the same token and norm: `random`, a Gaussian direction taken away, drawn anew at each firing; `other`,
    the direction of another of the atoms.

    Verdict (a claim of this project), over test firings (bootstrap over sequences and atoms):
    1. "below the floor": the median change of the readers is below 1e-6.
    2. "inconclusive" with too little data (`verdict.judge`); else "fails":
       the interval of log(change / change under random) at the reader does not lie above 0.
    3. "confounded": at the reader, the change is no larger than under another atom (the reader notices anything), or
       its log ratio is no larger than the mean of the other later heads (all of them notice it).
    4. "holds" otherwise.
    """

    kind: ClassVar[str] = "readers"
    title: ClassVar[str] = "Which later heads read an atom's write?"
    COLUMNS: ClassVar[dict[str, dict[str, str]]] = {
        "changes": {
            "firing": "number of the firing",
            "half": "select or test",
            "atom": "index in the dictionary",
            "sequence": "evaluation sequence",
            "position": "t",
            "layer": "of the later head",
            "mixer": "what it is a head of: recurrence or attention",
            "head": "the later head",
            "condition": "what was taken away: atom, random, other",
            "change": "of what the head gives over t..t+horizon, relative",
            "peak": "tokens after t at which the change is largest",
        }
    }

    def ratios(self, half: str) -> pd.DataFrame:
        """Per firing of one half and later head: `change` under the atom; `random` and `other`, the log ratio of it to
        the control's; `excess`, the first minus its mean over the other later heads (0 where there are none)."""
        table: Any = self.tables["changes"]
        index = ["firing", "atom", "sequence", *_HEAD]
        wide: Any = table[table["half"] == half].pivot(index=index, columns="condition", values="change")
        changes = {c: wide[c].to_numpy() for c in CONDITIONS}
        logs = {c: np.log(np.maximum(change, 1e-12)) for c, change in changes.items()}
        made = {c: logs["atom"] - logs[c] for c in ("random", "other")}
        found: Any = wide.index.to_frame(index=False).assign(change=changes["atom"], **made)
        group = found.groupby("firing")["random"]
        n = group.transform("size")
        others = (group.transform("sum") - found["random"]) / (n - 1).clip(lower=1)
        return found.assign(excess=np.where(n > 1, found["random"] - others, 0.0))

    def readers(self) -> pd.DataFrame:
        """The reader of each atom by the selection half: atom, layer, mixer, head, log_ratio there."""
        ratios: Any = self.ratios("select")
        mean: Any = ratios.groupby(["atom", *_HEAD])["random"].mean().reset_index()
        top: Any = mean.loc[mean.groupby("atom")["random"].idxmax()]
        return top.rename(columns={"random": "log_ratio"}).reset_index(drop=True)

    def at_readers(self) -> pd.DataFrame:
        """`ratios` of the test half, at each atom's own reader."""
        keys = ["atom", *_HEAD]
        return self.ratios("test").merge(self.readers()[keys], on=keys)

    def claims(self) -> list[Claim]:
        """Do the readers that one half names read on the other?"""
        if self.tables["changes"].empty:
            return [self._nothing_can_read()]
        own: Any = self.at_readers()
        found = {name: _over(own, name) for name in ("random", "other", "excess")}
        median = float(own["change"].median())
        alike = [why for name, why in _ALIKE.items() if not found[name].low > 0]
        if median < _FLOOR:
            outcome, why = "below the floor", f"The median change at the readers is {median:.1g}."
        elif too_little(found["random"].n, found["random"].n_clusters, found["random"].low, found["random"].high):
            outcome, why = "inconclusive", NO_DATA
        elif not found["random"].low > 0:
            outcome, why = "fails", "On the other half the readers change no more than under a random direction."
        elif alike:
            outcome, why = "confounded", f"{' and '.join(alike)}.".capitalize()
        else:
            outcome, why = "holds", "The readers notice the atom, more than another atom, and more than other heads do."
        readers: Any = self.readers()
        counts = pd.Series([head_name(r.layer, r.mixer, r.head) for r in readers.itertuples()]).value_counts()
        named = ", ".join(f"{head} of {n}" for head, n in counts.head(3).items())
        return [
            Claim(
                None,
                _CLAIM,
                f"change at the reader {median:.2g} of what it gives; {_times(found['random'])} that under a random "
                f"direction (readers: {named} atoms)",
                len(own),
                f"firings of {own['atom'].nunique()} atoms in {own['sequence'].nunique()} sequences",
                f"{_times(found['other'])} that under another atom; the ratio is {_times(found['excess'])} that of the "
                "other later heads",
                outcome,
                why,
            )
        ]

    def _nothing_can_read(self) -> Claim:
        why = f"No layer with heads comes after layer {self.info['layer']}: nothing can read what it writes."
        return Claim(None, _CLAIM, "no later head", 0, "firings", "", "not tested", why)

    def figures(self) -> list[Figure]:
        """Ratios at the readers, and at every later head."""
        if self.tables["changes"].empty:
            return []
        own = self.at_readers()
        every: Any = self.ratios("test")
        rows = [
            plots.Row("to random direction", *_log2(_over(own, "random")), "atom"),
            plots.Row("to another atom", *_log2(_over(own, "other")), "rival"),
            plots.Row("over other heads", *_log2(_over(own, "excess")), "soft"),
        ]
        name = f"{self.kind}: {self.label}"
        svg = plots.interval_figure(rows, "log2 ratio of changes", f"Ratios at the readers, {name}")
        made = [Figure("At the readers", svg, "Test half, 95 % intervals. Dashed: the reader notices nothing special.")]
        heads: Any = [(head_name(*place), part) for place, part in every.groupby(_HEAD)]
        heads.sort(key=lambda item: -item[1]["random"].mean())
        rows = [plots.Row(head, *_log2(_over(part, "random")), "atom") for head, part in heads[:_SHOWN]]
        svg = plots.interval_figure(rows, "log2 of the change over that under random", f"Later heads, {name}")
        shown = "" if len(heads) <= _SHOWN else f" The first {_SHOWN} of {len(heads)}."
        return [*made, Figure("Every later head", svg, f"All atoms, test half, 95 % intervals.{shown}")]

    def notes(self) -> list[str]:
        """What is not listed, and when the change comes."""
        table: Any = self.tables["changes"]
        said = ["H are recurrent heads, A attention heads; those of the same layer and below cannot read the write."]
        if not table.empty:
            peak = table[table["condition"] == "atom"]["peak"].median()
            said.append(f"The change of what a later head gives is largest {peak:.0f} tokens after the write (median).")
        return [*said, *super().notes()]


_CLAIM = "an atom's write has readers of its own among later heads"
_ALIKE = {
    "other": "the readers change as much when another atom is taken away",
    "excess": "the other later heads notice the atom as much",
}


def _over(table: Any, column: str) -> Estimate:
    return estimate_over_atoms(table[column], table["sequence"], table["atom"])


def _times(found: Estimate) -> str:
    """A mean log ratio as a factor."""
    return f"{np.exp(found.mean):.2f} [{np.exp(found.low):.2f}, {np.exp(found.high):.2f}] times"


def _log2(found: Estimate) -> tuple[float, float, float]:
    return found.mean / np.log(2), found.low / np.log(2), found.high / np.log(2)
