"""The ladder: each rung, both directions, and the order of the rungs."""

from __future__ import annotations

import math
from typing import Any

import pytest

from writesae.dictionary.estimates import Estimate
from writesae_study.verdict.judge import Against, judge


def over(low: float, high: float, n: int = 100, clusters: int = 20) -> Estimate:
    return Estimate((low + high) / 2, low, high, n, clusters)


def around(mean: float, half: float = 0.05) -> Estimate:
    return over(mean - half, mean + half)


SIZE: dict[str, Any] = {"relevant": 0.05}
HALF = SIZE | {"chance": 0.5}
FALLS = SIZE | {"less": True}


@pytest.mark.parametrize(
    ("effect", "settings", "outcome"),
    [
        (around(0.8), HALF, "holds"),
        (around(-0.3), FALLS, "holds"),
        (around(0.8), SIZE | {"typical": 0.1}, "holds"),  # the floor is 0
        (around(0.2), HALF, "fails"),
        (around(0.3), FALLS, "fails"),
        # An effect must exceed what matters, and fails where it is shown not to.
        (over(0.06, 0.10), SIZE, "holds"),
        (over(0.04, 0.06), SIZE, "inconclusive"),
        (over(-0.02, 0.08), SIZE, "inconclusive"),
        (over(0.01, 0.04), SIZE, "fails"),  # above chance, and too small
        (over(-0.10, -0.06), FALLS, "holds"),
        (over(-0.06, -0.04), FALLS, "inconclusive"),
        (over(-0.04, -0.01), FALLS, "fails"),
        (over(-0.1, 0.1), {"relevant": 0.1}, "fails"),  # at the bound, the effect is the smaller one
        (over(0.45, 0.67, 40, 10), HALF | {"relevant": 0.1}, "inconclusive"),
        # Too little data comes first.
        (over(0.75, 0.85, n=20, clusters=5), HALF, "holds"),
        (over(0.8, 1.0, n=19), HALF | {"typical": 0.0, "floor": 1.0}, "inconclusive"),
        (over(0.8, 1.0, clusters=4), HALF | {"typical": 0.0, "floor": 1.0}, "inconclusive"),
        (over(math.nan, math.nan), SIZE, "inconclusive"),
        # Below the floor comes before everything else.
        (around(0.9), HALF | {"typical": 1e-9, "floor": 1e-8}, "below the floor"),
        (around(0.9), HALF | {"typical": 1e-8, "floor": 1e-8}, "below the floor"),
        (around(0.9), HALF | {"typical": 1e-7, "floor": 1e-8}, "holds"),
        # All units are alike: three in so many may have another value.
        (over(0, 0), {"relevant": 0.149}, "inconclusive"),
        (over(0, 0), {"relevant": 0.15}, "fails"),
        (over(0, 0, 40), HALF, "fails"),  # wins none
    ],
)
def test_the_outcome_of_an_effect_by_itself(effect: Estimate, settings: dict[str, Any], outcome: str) -> None:
    assert judge(effect, **settings).outcome == outcome


IDLE, OWN = around(0.5, 0.04), around(0.8)


@pytest.mark.parametrize(
    ("effect", "control", "settings", "outcome"),
    [
        (0.8, Against(around(0.5), own=OWN, chance=0.5), HALF | {"relevant": 0.1}, "confounded"),
        (0.8, Against(over(0.46, 0.70), own=OWN, chance=0.5), HALF | {"relevant": 0.1}, "undecided"),
        (0.8, Against(around(0.5), own=IDLE, chance=0.5), HALF, "holds"),  # it does nothing by itself
        (0.9, Against(around(0.7), own=OWN, chance=0.5), HALF, "holds"),  # it is beaten
        (0.9, Against(over(1e-15, 1e-13)), {"relevant": 0.05}, "confounded"),  # a difference of rounding
        (0.9, Against(over(1e-9, 0.1)), {"relevant": 0.1}, "confounded"),
        (0.9, Against(over(1.2e-9, 1e-7)), {"relevant": 0.05}, "holds"),
        (
            0.9,
            Against(over(-0.1, 0.1)),
            {"relevant": 0.1},
            "confounded",
        ),  # at the margin
        (0.8, Against(around(0.0), own=over(0.0, 0.2)), SIZE, "confounded"),  # it may reach what matters
        (-0.8, Against(around(0.0), own=over(-0.04, 0.02)), FALLS, "holds"),
        (-0.5, Against(around(-0.3)), FALLS, "holds"),
        (-0.5, Against(around(0.0, 0.01)), FALLS | {"relevant": 0.02}, "confounded"),
        (0.3, Against(around(0.0), own=around(0.4)), HALF | FALLS | {"relevant": 0.1}, "confounded"),
        (0.5, Against(around(0.0, 0.01)), SIZE, "confounded"),
    ],
)
def test_the_outcome_beside_a_control(effect: float, control: Against, settings: dict[str, Any], outcome: str) -> None:
    verdict = judge(around(effect), {"mean write": control}, **settings)
    assert verdict.outcome == outcome
    assert (verdict.unbeaten_controls == ("mean write",)) == (outcome != "holds")


def test_controls_are_named_by_their_distance_from_their_own_chance() -> None:
    far, near, open_ = Against(around(0.4), chance=0.5), Against(around(-0.01)), Against(over(-0.1, 0.2))
    verdict = judge(around(0.8), {"open": open_, "near": near, "far": far}, relevant=0.1)
    assert verdict.unbeaten_controls == ("far", "near", "open")
