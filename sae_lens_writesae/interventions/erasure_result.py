"""Settings and result of the erasure test (`erasure`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from sae_lens_writesae.evaluation import Claim, Evaluation, Figure
from sae_lens_writesae.interventions import plots
from sae_lens_writesae.interventions.common import FLOOR, Estimate, check_at_least, estimate_over_atoms
from sae_lens_writesae.steering import Target
from sae_lens_writesae.verdict import statistics as stats
from sae_lens_writesae.verdict.judge import NO_DATA, too_little

CONTROLS = ("elsewhere", "random", "wrong")
_NAMES = {
    "elsewhere": "other writes, same norm",
    "random": "random directions, each with a token of its own",
    "wrong": "other tokens of like probability",
}


@dataclass(frozen=True)
class ErasureConfig:
    """What is erased, and where it is looked at."""

    n_atoms: int | None = 20
    """Atoms drawn uniformly from those that fire often enough in both halves. None: all of them."""
    atoms: tuple[int, ...] | None = None
    """A hand-picked list instead of a draw."""
    token: Target | None = None
    """Look at this token (id or string) for every atom, instead of choosing one for each."""
    select_firings: int = 24
    """At most so many firings of an atom for the choice of its token, dealt over sequences."""
    test_firings: int = 12
    """At most so many for the test, in the other half of the sequences."""
    min_firings: int = 4
    """Firings in each half that an atom needs; those of the test half must lie in at least two sequences."""
    erase: Literal["component", "write"] = "component"
    """Take away the atom's component a_i A_i of the write, or the whole write at its firings."""
    horizon: int = 4
    """The effect is the mean change of a token's log-probability over t..t+horizon."""
    first_position: int = 1
    """Firings before this token are left out."""
    rows_per_run: int = 256
    """Edited rows at once; does not change results."""
    seed: int = 0
    """Of the split, the draw and the controls."""
    label: str = ""
    """Name in reports."""

    def __post_init__(self) -> None:
        if self.erase not in ("component", "write"):
            raise ValueError(f"erase must be 'component' or 'write', found {self.erase!r}")
        least: dict[str, float] = {"n_atoms": 1, "select_firings": 2, "test_firings": 2, "min_firings": 2}
        check_at_least(self, least | {"horizon": 0, "first_position": 0, "rows_per_run": 1})
        fewest = min(self.select_firings, self.test_firings)
        if self.min_firings > fewest:
            raise ValueError(f"min_firings ({self.min_firings}) is above select_firings or test_firings ({fewest})")
        if self.atoms is not None:
            object.__setattr__(self, "atoms", tuple(int(i) for i in self.atoms))
            if not self.atoms:
                raise ValueError("atoms is an empty list; leave it None to draw atoms")


class Erasure(Evaluation):
    """What erasing atoms does to a token's log-probability, in nats.

    Definition: at a firing (t, i) the write becomes W_t - a_i A_i (or 0, with erase="write"); the effect on a token is
    the mean over t..t+horizon of log p(edited) - log p(native). An atom's token is the one whose log-probability falls
    most on average over the firings of the selection half of the sequences; `effect` is measured on the other half.

    Controls, at the same norm: `random`, one random direction for each atom, taken away at the atom's firings and
    looked at on a token that was chosen for it in the same way (what any fixed direction would show); `elsewhere`,
    taken from the native write at a random position of the same sequence where the atom is silent; `wrong`, the
    erasure itself, looked at on the eight tokens whose native log-probability on the selection half is nearest to that
    of the atom's token. Beside them stands `selected`, the mean on the half that the token was chosen on: what a test
    without a split would report.

    Verdict of claim 8, over all test firings (bootstrap over sequences and atoms; over sequences for a single atom):
    1. "below the floor": the effect's size is below 1e-5 nats.
    2. "inconclusive" with too little data (`verdict.judge`); else "fails":
       the interval of the effect does not lie below 0.
    3. "confounded": for some control the interval of effect - control does not lie below 0.
    4. "holds" otherwise.
    """

    kind: ClassVar[str] = "erasure"
    title: ClassVar[str] = "Does erasing an atom lower a token of its own?"
    COLUMNS: ClassVar[dict[str, dict[str, str]]] = {
        "atoms": {
            "atom": "index in the dictionary",
            "token": "chosen on the selection half",
            "text": "the token as text",
            "n_select": "firings it was chosen on",
            "n": "firings it was tested on",
            "selected": "nats, mean effect on the selection half: biased by the choice",
            "effect": "nats, mean effect on the test half",
            "elsewhere": "nats, control: other writes, same token",
            "random": "nats, control: a random direction, on the token chosen for it",
            "wrong": "nats, control: the erasure on tokens of like probability",
            "p": "largest p of sign-flip tests against the controls, by sequence; Holm-adjusted over atoms",
        },
        "firings": {
            "atom": "index in the dictionary",
            "sequence": "test sequence",
            "position": "token t of the firing",
            "activation": "a_i",
            "effect": "nats, of the erasure on the atom's token",
            "elsewhere": "nats, control: other writes",
            "random": "nats, control: a random direction",
            "wrong": "nats, control: other tokens",
            "elsewhere_position": "where the control took the norm away",
        },
    }

    def estimate(self, name: str, minus: str | None = None) -> Estimate:
        """Mean over all test firings of `effect` or a control; with `minus` the paired difference."""
        table: Any = self.tables["firings"]
        values = table[name] - (table[minus] if minus else 0.0)
        return estimate_over_atoms(values, table["sequence"], table["atom"])

    @property
    def selected(self) -> float:
        """Mean effect on the half that tokens were chosen on, over firings."""
        atoms = self.tables["atoms"]
        return float(np.average(atoms["selected"], weights=atoms["n_select"]))

    def claims(self) -> list[Claim]:
        """Claim 8 over all firings, and how many atoms show it by themselves."""
        effect = self.estimate("effect")
        alike = [c for c in CONTROLS if not self.estimate("effect", c).high < 0]
        if abs(effect.mean) < FLOOR:
            outcome, why = "below the floor", f"The effect is smaller than {FLOOR:g} nats."
        elif too_little(effect.n, effect.n_clusters, effect.low, effect.high):
            outcome, why = "inconclusive", NO_DATA
        elif not effect.high < 0:
            outcome, why = "fails", "On sequences that it was not chosen on, the token does not fall."
        elif alike:
            outcome, why = "confounded", f"As much is shown by {_listed(alike)}."
        else:
            outcome, why = "holds", "The token falls on other sequences, and more than under every control."
        table: Any = self.tables["firings"]
        falls = stats.success_rate(table["effect"] < 0, table["sequence"])
        claim = Claim(
            8,
            "erasing an atom lowers its token",
            f"{effect} nats; falls on {falls.rate:.0%} [{falls.wilson.low:.0%}, {falls.wilson.high:.0%}] of firings; "
            f"{self.selected:+.3g} on the half that the token was chosen on",
            len(table),
            f"firings of {table['atom'].nunique()} atoms in {table['sequence'].nunique()} sequences",
            "; ".join(f"{_NAMES[c]} {self.estimate(c)}" for c in CONTROLS),
            outcome,
            why,
        )
        return [claim, self._single_atoms()]

    def _single_atoms(self) -> Claim:
        atoms: Any = self.tables["atoms"]
        lowest = atoms[list(CONTROLS)].min(axis=1)
        whole = self.estimate("effect")
        few = too_little(whole.n, whole.n_clusters, whole.low, whole.high)
        single = int(((atoms["p"] < 0.05) & (atoms["effect"] < lowest)).sum())
        return Claim(
            None,
            "single atoms have a token of their own",
            f"{single} of {len(atoms)} atoms (Holm-adjusted p < 0.05 against every control)",
            len(atoms),
            "atoms",
            "sign flips of effect - control by sequence; the largest p of the three controls counts",
            "holds" if single else "inconclusive" if few else "fails",
            "At least one atom lowers its token more than every control."
            if single
            else NO_DATA
            if few
            else "No atom does by itself.",
        )

    def figures(self) -> list[Figure]:
        """Pooled effects, and each atom on both halves."""
        atoms, same = self.tables["atoms"], self.selected
        rows = [
            plots.Row("chosen and tested here", same, same, same, "muted"),
            plots.Row("erased, other half", *self.estimate("effect")[:3], "atom"),
            plots.Row("other writes", *self.estimate("elsewhere")[:3], "soft"),
            plots.Row("random, own token", *self.estimate("random")[:3], "rival"),
            plots.Row("other tokens", *self.estimate("wrong")[:3], "soft"),
        ]
        name = f"{self.kind}: {self.label}"
        return [
            Figure(
                "Erased, and controls",
                plots.interval_figure(rows, "change of the atom's token, nats", f"Effect of {name}"),
                "Mean over firings with 95 % intervals. The first row is biased by the choice of the token.",
            ),
            Figure(
                "What the choice adds",
                plots.scatter_figure(
                    atoms["selected"],
                    atoms["effect"],
                    ("half that the token was chosen on, nats", "other half, nats"),
                    f"Atoms on both halves, {name}",
                ),
                "One point an atom; on the dashed line the choice would add nothing.",
            ),
        ]


def _listed(controls: Sequence[str]) -> str:
    return " and ".join(_NAMES[c] for c in controls)
