"""The ladder: each rung, both directions, and the order of the rungs."""

from __future__ import annotations

import math
from typing import Any

import pytest

from writesae.verdict.judge import Against, judge
from writesae.verdict.statistics import Estimate


def around(mean: float, half: float = 0.05, n: int = 100, clusters: int = 20) -> Estimate:
    return Estimate(mean, mean - half, mean + half, n, clusters)


def test_holds_beyond_chance_without_controls():
    assert judge(around(0.8), chance=0.5).outcome == "holds"
    assert judge(around(-0.3), less=True).outcome == "holds"


def test_what_is_not_given_asks_for_nothing():
    assert judge(around(0.06, half=0.03), relevant=0.1).outcome == "holds"  # only a large one has to reach it
    assert judge(Estimate(0.3, -0.1, 0.7, 100, 20)).outcome == "fails"  # no size is relevant
    assert judge(around(0.8), typical=0.1).outcome == "holds"  # the floor is 0


def test_fails_where_the_interval_reaches_chance():
    assert judge(around(0.52), chance=0.5).outcome == "fails"
    assert judge(around(0.2), chance=0.5).outcome == "fails"
    assert judge(around(0.3), less=True).outcome == "fails"


def test_twenty_observations_in_five_units_are_enough():
    assert judge(around(0.8, n=20, clusters=5), chance=0.5).outcome == "holds"


@pytest.mark.parametrize(("n", "clusters"), [(19, 20), (100, 4)])
def test_too_little_data_comes_first(n: int, clusters: int):
    poor = Estimate(0.9, 0.8, 1.0, n, clusters)
    assert judge(poor, chance=0.5, typical=0.0, floor=1.0).outcome == "inconclusive"


@pytest.mark.parametrize(("clusters", "few"), [(19, True), (20, False)])
def test_a_failure_over_few_units_says_so(clusters: int, few: bool):
    verdict = judge(around(0.52, clusters=clusters), chance=0.5)
    assert verdict.outcome == "fails" and (f"{clusters} units only" in verdict.sentence) == few


def test_an_interval_that_cannot_be_formed_is_inconclusive():
    assert judge(Estimate(0.9, math.nan, math.nan, 100, 20)).outcome == "inconclusive"


def test_an_interval_with_chance_and_a_relevant_effect_is_inconclusive():
    wide = Estimate(0.56, 0.45, 0.67, 40, 10)
    assert judge(wide, chance=0.5, relevant=0.1).outcome == "inconclusive"
    narrow = Estimate(0.51, 0.47, 0.55, 4000, 100)
    assert judge(narrow, chance=0.5, relevant=0.1).outcome == "fails"
    below = Estimate(-0.06, -0.17, 0.05, 40, 10)
    assert judge(below, less=True, relevant=0.1).outcome == "inconclusive"


@pytest.mark.parametrize(("clusters", "outcome"), [(20, "inconclusive"), (40, "fails")])
def test_units_that_are_all_alike_say_nothing_of_three_in_so_many(clusters: int, outcome: str):
    verdict = judge(Estimate(0.0, 0.0, 0.0, 2 * clusters, clusters), relevant=0.1)
    assert verdict.outcome == outcome and f"{3 / clusters:.2g} of" in verdict.sentence
    assert judge(Estimate(0.0, 0.0, 0.0, 40, 20), chance=0.5, relevant=0.05).outcome == "fails"  # wins none


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [
        (0.06, 0.10, "holds"),
        (0.04, 0.06, "inconclusive"),  # it may be smaller, or larger, than what matters
        (-0.02, 0.08, "inconclusive"),
        (0.01, 0.04, "fails"),  # above chance, and shown to be too small
        (-0.02, 0.02, "fails"),
        (-0.10, -0.05, "fails"),
    ],
)
@pytest.mark.parametrize("less", [False, True])
def test_a_large_effect_lies_beyond_what_matters(low: float, high: float, outcome: str, less: bool):
    mean = (low + high) / 2
    effect = Estimate(-mean, -high, -low, 100, 20) if less else Estimate(mean, low, high, 100, 20)
    assert judge(effect, relevant=0.05, large=True, less=less).outcome == outcome
    rival = Against(around(0.0, half=0.01))
    if outcome == "holds":
        assert judge(effect, {"c": rival}, relevant=0.05, large=True, less=less).outcome == "confounded"


@pytest.mark.parametrize(
    ("interval", "settings", "words"),
    [
        ((0.04, 0.06), {"large": True}, "an effect short of 0.05"),
        ((-0.02, 0.08), {"large": True}, "both chance (0)"),
        ((0.0, 0.08), {"large": True}, "both chance (0)"),
        ((-0.02, 0.08), {}, "both chance (0)"),
        ((0.01, 0.04), {"large": True}, "lies above 0, but does not reach 0.05"),
        (
            (0.30, 0.49),
            {"large": True, "less": True, "chance": 0.5, "relevant": 0.3},
            "lies below 0.5, but does",
        ),
        ((0.30, 0.49), {"large": True, "less": True, "chance": 0.5, "relevant": 0.3}, "reach 0.2, from which on"),
        ((-0.02, 0.02), {"large": True}, "does not lie above 0. A true value of"),
        ((0.0, 0.02), {"large": True}, "does not lie above 0. A true value of"),
        ((0.45, 0.55), {"less": True, "chance": 0.5}, "does not lie below 0.5. A true value of 0.43"),
        ((-2.0, 0.02), {}, "Samples like this one find no value reliably"),
        ((0.06, 0.10), {"large": True}, "lies above 0.05; no control was run"),
        ((0.60, 0.70), {"chance": 0.5}, "lies beyond chance (0.5); no control was run"),
        ((0.60, 0.70), {"chance": 0.5, "against": {"c": Against(around(0.2))}}, "(0.5), and every control is beaten"),
    ],
)
def test_the_sentence_says_where_the_interval_lies(interval: tuple[float, float], settings: dict[str, Any], words: str):
    effect = Estimate(sum(interval) / 2, *interval, 100, 20)
    given: dict[str, Any] = {"relevant": 0.05} | settings
    assert words in judge(effect, **given).sentence


@pytest.mark.parametrize(("names", "listed"), [("a", "from a."), ("ab", "from a and b."), ("abc", "from a, b and c.")])
def test_the_sentence_lists_what_is_not_told_apart(names: str, listed: str):
    open_ = {name: Against(Estimate(0.05, -0.1, 0.2, 100, 20)) for name in names}
    assert judge(around(0.5), open_).sentence.endswith(listed)


def test_a_failure_that_is_above_chance_says_nothing_of_chance():
    assert "four of five" not in judge(Estimate(0.02, 0.01, 0.04, 100, 20), relevant=0.05, large=True).sentence


def test_ends_of_intervals_that_meet_a_bound():
    """Exactly at a bound, the effect is the smaller one, and the control the better one."""
    assert judge(Estimate(0.0, -0.1, 0.1, 100, 20), relevant=0.1).outcome == "fails"
    alike = Estimate(0.0, 0.0, 0.0, 40, 20)
    assert judge(alike, relevant=0.15).outcome == judge(alike).outcome == "fails"  # 3 in 20 units
    at_margin, at_rounding = Estimate(0.0, -0.1, 0.1, 100, 20), Estimate(0.05, 1e-9, 0.1, 100, 20)
    for contrast in (at_margin, at_rounding):
        assert judge(around(0.9), {"c": Against(contrast)}, relevant=0.1).outcome == "confounded"
    for idle, less in ((Estimate(0.1, 0.0, 0.2, 100, 20), False), (Estimate(-0.1, -0.2, 0.0, 100, 20), True)):
        effect = around(-0.8 if less else 0.8)
        assert judge(effect, {"c": Against(around(0.0), own=idle)}, less=less).outcome == "holds"


def test_a_control_below_chance_confounds_what_should_fall():
    equal = Against(around(0.0), own=around(0.4))
    assert judge(around(0.3), {"c": equal}, chance=0.5, less=True, relevant=0.1).outcome == "confounded"


def test_controls_are_ordered_by_their_distance_from_their_own_chance():
    far, near = Against(around(0.4), chance=0.5), Against(around(-0.01))
    assert judge(around(0.8), {"near": near, "far": far}, relevant=0.1).unbeaten_controls == ("far", "near")


def test_the_verdict_names_all_that_is_not_beaten():
    equal, open_ = Against(around(-0.2)), Against(Estimate(0.05, -0.1, 0.2, 100, 20))
    verdict = judge(around(0.5), {"open": open_, "equal": equal}, relevant=0.05, large=True)
    assert verdict.outcome == "confounded" and verdict.unbeaten_controls == ("equal", "open")
    assert all(name in verdict.sentence for name in ("equal", "open"))


def test_below_the_floor_comes_before_everything_but_data():
    assert judge(around(0.9), chance=0.5, typical=1e-9, floor=1e-8).outcome == "below the floor"
    assert judge(around(0.9), chance=0.5, typical=1e-8, floor=1e-8).outcome == "below the floor"
    assert judge(around(0.9), chance=0.5, typical=1e-7, floor=1e-8).outcome == "holds"


def test_a_control_that_does_as_well_confounds():
    equal = Against(around(0.5), own=around(0.8), chance=0.5)
    verdict = judge(around(0.8), {"mean write": equal}, chance=0.5, relevant=0.1)
    assert verdict.outcome == "confounded"
    assert verdict.unbeaten_controls == ("mean write",)


def test_a_control_that_may_be_worse_or_equal_leaves_it_undecided():
    open_ = Against(Estimate(0.58, 0.46, 0.70, 100, 20), own=around(0.8), chance=0.5)
    assert judge(around(0.8), {"c": open_}, chance=0.5, relevant=0.1).outcome == "undecided"


def test_a_control_that_does_nothing_by_itself_cannot_confound():
    idle = Against(around(0.5), own=around(0.5), chance=0.5)
    assert judge(around(0.8), {"c": idle}, chance=0.5).outcome == "holds"


def test_a_control_that_is_beaten_does_not_confound():
    beaten = Against(around(0.7), own=around(0.8), chance=0.5)
    assert judge(around(0.9), {"c": beaten}, chance=0.5).outcome == "holds"


def test_a_difference_of_rounding_beats_no_control():
    tied = Against(Estimate(1e-14, 1e-15, 1e-13, 100, 20))
    assert judge(around(0.9), {"c": tied}, relevant=0.05).outcome == "confounded"
    tiny = Against(Estimate(1e-8, 1.2e-9, 1e-7, 100, 20))
    assert judge(around(0.9), {"c": tiny}, relevant=0.05).outcome == "holds"


def test_the_strongest_unbeaten_control_is_named_first():
    weak, strong = Against(around(0.48)), Against(around(0.2))
    weak, strong = weak._replace(chance=0.5), strong._replace(chance=0.5)
    verdict = judge(around(0.8), {"weak": weak, "strong": strong}, chance=0.5, relevant=0.1)
    assert verdict.unbeaten_controls == ("strong", "weak")


def test_controls_of_an_effect_that_should_fall():
    beaten, equal = Against(around(-0.3)), Against(around(0.0, half=0.01))
    assert judge(around(-0.5), {"c": beaten}, less=True).outcome == "holds"
    assert judge(around(-0.5), {"c": equal}, less=True, relevant=0.02).outcome == "confounded"
