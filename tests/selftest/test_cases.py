"""Known truth: every evaluation has cases in which it must and must not hold, and they come out so."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from selftest.cases import CASES, SETTINGS, Case, Wanted
from selftest.dictionaries import DICTIONARIES
from selftest.worlds import world_of

from writesae.evaluations import EVALUATIONS
from writesae.verdict.paper import Outcome

ALLOWED: Mapping[Wanted, tuple[Outcome, ...]] = {
    "must hold": ("holds",),
    "must be confounded": ("confounded",),
    "must not hold": ("fails", "confounded", "undecided", "inconclusive", "below the floor"),
}
"""What fulfils a case. A claim that was not tested fulfils none."""


@pytest.mark.parametrize("kind", sorted(EVALUATIONS))
def test_every_evaluation_has_a_planted_truth_and_a_world_without_it(kind: str) -> None:
    wanted = {wanted for case in CASES if case.kind == kind for wanted in case.claims.values()}
    assert "must hold" in wanted and len(wanted) > 1


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=[] if case.kind == "seeds" else pytest.mark.slow) for case in CASES],
)
def test_claims_come_out_as_they_must(case: Case) -> None:
    world = world_of(case.world)
    made = DICTIONARIES[case.dictionary](world)
    saes = made if isinstance(made, Mapping) else {"": made}
    evaluation = EVALUATIONS[case.kind].from_dict(SETTINGS[case.kind] | dict(case.settings))
    claims = evaluation.run(world.model, saes, world.tokens, progress=False, or_skip=True).claims()
    for words, wanted in case.claims.items():
        claim = next(each for each in claims if words in each.claim)
        assert claim.outcome in ALLOWED[wanted], claim
