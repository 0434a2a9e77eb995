"""Known truth: every evaluation has cases in which it must and must not hold, and they come out so."""

from __future__ import annotations

import pytest
import torch
from selftest.cases import CASES, SETTINGS, Case, Wanted
from selftest.dictionaries import DICTIONARIES, oracle, planted_atoms
from selftest.run import fulfilled, run_case
from selftest.worlds import WORLDS, World, world_of
from torch import Tensor

from writesae.evaluations import EVALUATIONS
from writesae.experiment.lab import Lab
from writesae.verdict.finding import Claim
from writesae.verdict.paper import Outcome

FAST = ("seeds",)
"""Evaluations whose cases take a second or two each."""


@pytest.mark.parametrize("kind", sorted(EVALUATIONS))
def test_every_evaluation_has_a_planted_truth_and_a_world_without_it(kind: str) -> None:
    wanted = [wanted for case in CASES if case.kind == kind for wanted in case.claims.values()]
    assert "must hold" in wanted
    assert {"must not hold", "must be confounded"} & set(wanted)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases_name_what_there_is(case: Case) -> None:
    assert case.kind in EVALUATIONS and case.world in WORLDS and case.dictionary in DICTIONARIES
    EVALUATIONS[case.kind].from_dict(SETTINGS[case.kind] | dict(case.settings))


def _marked(case: Case) -> object:
    marks = [] if case.kind in FAST else [pytest.mark.slow]
    return pytest.param(case, id=case.name, marks=marks)


@pytest.mark.parametrize("case", [_marked(case) for case in CASES])
def test_claims_come_out_as_they_must(case: Case) -> None:
    rows = list(run_case(case))
    assert len(rows) == len(case.claims) + len(case.numbers)
    assert not [row for row in rows if not row.ok]


def written(world: World) -> Tensor:
    """[n] the atom that each write of the text is, and a check that it is one."""
    with torch.no_grad():
        writes = Lab(world.model, {"": oracle(world)}, world.tokens).native_writes(range(len(world.tokens)))
    best = planted_atoms(world).cosines(writes).max(0)
    assert bool(((best.values - 1).abs() < 1e-5).all())
    return best.indices


def test_every_write_of_the_planted_world_is_an_atom_that_its_token_does_not_tell() -> None:
    """Otherwise the mean write of the token would explain what atoms do."""
    world = world_of("planted")
    atoms, ids = written(world), world.tokens.flatten()
    assert len(atoms.unique()) == 32
    counts = torch.bincount(ids)
    shares = [torch.bincount(atoms[ids == token]).max() / counts[token] for token in counts.topk(10).indices]
    assert float(torch.stack(shares).mean()) < 0.3


@pytest.mark.parametrize(
    "outcome, wanted, ok",
    [
        ("holds", "must hold", True),
        ("undecided", "must hold", False),
        ("holds", "must not hold", False),
        ("fails", "must not hold", True),
        ("not tested", "must not hold", False),
        ("confounded", "must be confounded", True),
        ("fails", "must be confounded", False),
    ],
)
def test_a_claim_that_was_not_tested_fulfils_nothing(outcome: Outcome, wanted: Wanted, ok: bool) -> None:
    claim = Claim(None, "c", "m", 1, "u", "", outcome, "s")
    assert fulfilled(claim, wanted) == ok


def test_an_oracle_fires_once_at_every_token() -> None:
    world = world_of("planted")
    with torch.no_grad():
        _, cache = world.model.run_with_cache(world.tokens[:2], names_filter=[world.hook])
        active = oracle(world).encode(cache[world.hook]) > 0
    assert bool((active.sum(-1) == 1).all())
