"""The only ladder of verdicts. Every evaluation says what it measured, against what; `judge` says what that means.

The rungs, in order:

1. *inconclusive*: there are too few units for an interval (`MIN_CLUSTERS`, `MIN_OBSERVATIONS`).
2. *below the floor*: the typical size of what is measured is not above what rounding alone moves.
3. *fails*: the interval of the effect does not reach `relevant`, from which on an effect matters. *inconclusive*: the
   interval holds `relevant`; or all units are alike, which leaves no interval, and the rule of three does not exclude
   an effect that would matter. An effect that is there and does not matter is no finding.
4. *confounded*: a control that contains none of the atom's information does at least as well. *undecided*: the effect
   is not shown to exceed a control, and the control is not shown to match it.
5. *holds*.

An outcome is about the measured dictionary and text; `verdict.paper` says what the paper claims.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from writesae.dictionary.estimates import Estimate
from writesae_study.verdict.paper import Outcome

MIN_CLUSTERS = 5
"""Independent units (sequences, atoms, prompts) below which no interval is trusted: over 4 clusters the one of a
mean covers a normal sample's in fewer than 90 of 100 cases."""
MIN_OBSERVATIONS = 20
"""Observations below which no outcome is reported."""
FEW_CLUSTERS = 20
"""Independent units below which a "fails" says how few there were."""
_UNSEEN = 3.0
"""Rule of three: what none of n units shows may be found, by the end of its 95% interval, in 3 / n of all units."""
_ROUNDING = 1e-9
"""A difference from a control that is no larger is one of rounding."""


class Against(NamedTuple):
    """One control, as the effect's rival."""

    contrast: Estimate
    """Effect against control, pair by pair: a difference (chance 0) or a win rate (chance 1/2)."""
    own: Estimate | None = None
    """What the control itself reaches. A control that is shown to stay below `relevant` by itself cannot confound; one
    that may reach it must be beaten. None: any control that is not beaten counts."""
    chance: float = 0.0
    """Value of `contrast` that says "no difference"."""


class Verdict(NamedTuple):
    """What became of one claim."""

    outcome: Outcome
    sentence: str
    unbeaten_controls: tuple[str, ...] = ()
    """Controls that the effect is not shown to exceed, the strongest first."""


def judge(
    effect: Estimate,
    against: Mapping[str, Against] | None = None,
    *,
    typical: float | None = None,
    floor: float = 0.0,
    chance: float = 0.0,
    less: bool = False,
    relevant: float,
    what: str = "the effect",
) -> Verdict:
    """Judge one effect by the rungs above.

    Args:
        effect: the headline estimate with its 95% interval.
        against: controls by the name that a reader should see.
        typical: typical size of what is measured (a median deletion effect, say), in the units of `floor`. None: there
            is no floor.
        floor: what a no-op moves, measured in the same run.
        chance: value of `effect` that says "nothing".
        less: the effect is below chance where the claim holds (a log-probability that falls).
        relevant: distance from chance that the effect must exceed. Also the margin by which a control may be worse and
            still count as equal.
        what: the effect as the subject of a sentence.

    Returns: outcome, one sentence, and the controls that the effect is not shown to exceed.
    """
    if (reason := too_little(effect)) is not None:
        return Verdict("inconclusive", reason)
    if typical is not None and not typical > floor:
        return Verdict(
            "below the floor", f"The typical size, {typical:.2g}, is no larger than what a no-op moves, {floor:.2g}."
        )
    # The effect alone: does its interval exceed what matters?
    sign = -1.0 if less else 1.0
    side = "below" if less else "above"
    low, high = _ends_beyond(effect, chance, sign)
    far = chance + sign * relevant
    if not low > relevant:
        # An interval without width says nothing of units that were not seen.
        unseen = _UNSEEN / effect.n_clusters if low == high else 0.0
        alike = (
            f"All {effect.n_clusters} units have the same value; up to {unseen:.2g} of all such units may have another."
        )
        if high + unseen > relevant:
            missed = f"The interval of {what} contains {far:g}, from which on it matters."
            return Verdict("inconclusive", f"{alike} An effect of {far:g} could be missed so." if unseen else missed)
        sentence = f"The interval of {what} does not lie {side} {far:g}."
        if unseen:
            sentence += f" {alike}"
        elif effect.n_clusters < FEW_CLUSTERS:
            sentence += f" It is over {effect.n_clusters} units only."
        return Verdict("fails", sentence)
    # The effect beside each control: which ones are not beaten, and which of these match it?
    leads: list[tuple[float, str]] = []  # of controls that are not beaten
    equals: set[str] = set()
    for name, control in (against or {}).items():
        worst, best = _ends_beyond(control.contrast, control.chance, sign)
        is_small = control.own is not None and _ends_beyond(control.own, chance, sign)[1] <= relevant
        if worst > _ROUNDING or is_small:
            continue
        leads.append((sign * (control.contrast.mean - control.chance), name))
        if best <= relevant:
            equals.add(name)
    unbeaten = tuple(name for _, name in sorted(leads))
    alike = _listed_names([name for name in unbeaten if name in equals])
    worse = _listed_names([name for name in unbeaten if name not in equals])
    if alike:
        more = f" Not beaten, perhaps worse: {worse}." if worse else ""
        return Verdict("confounded", f"Not beaten, and not shown to be worse: {alike}.{more}", unbeaten)
    if worse:
        return Verdict("undecided", f"Not distinguishable from {worse}.", unbeaten)
    reached = f"The interval of {what} lies {side} {far:g}"
    return Verdict("holds", reached + (", and every control is beaten." if against else "; no control was run."))


def too_little(effect: Estimate) -> str | None:
    """Why no verdict can be given, or None: an interval needs `MIN_CLUSTERS` units and `MIN_OBSERVATIONS` values."""
    if effect.n_clusters < MIN_CLUSTERS or effect.n < MIN_OBSERVATIONS:
        return (
            f"Too little data: {effect.n} observations in {effect.n_clusters} independent units; a verdict needs "
            f"{MIN_OBSERVATIONS} in {MIN_CLUSTERS}."
        )
    if not (effect.low <= effect.high):  # NaN
        return "Too little data: no interval can be formed."
    return None


def _ends_beyond(estimate: Estimate, chance: float, sign: float) -> tuple[float, float]:
    """The ends of an interval as distances from chance, the lower one first. `sign`: -1 where an effect is to fall."""
    low, high = sorted((sign * (estimate.low - chance), sign * (estimate.high - chance)))
    return low, high


def _listed_names(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
