"""What a case of known truth gives: a row for each claim and number, and whether it came out as it must."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from selftest.cases import SETTINGS, Case, Wanted
from selftest.dictionaries import DICTIONARIES, Dictionaries, planted_atoms
from selftest.worlds import World, world_of

from writesae.evaluations import EVALUATIONS
from writesae.experiment.at_firings import wide_firings
from writesae.experiment.evaluation import Result
from writesae.verdict.finding import Claim
from writesae.verdict.statistics import recovered_share


class Row(NamedTuple):
    """One line of the table: one claim, or one number, of one case."""

    evaluation: str
    world: str
    dictionary: str
    claim: str
    expected: str
    outcome: str
    measured: str
    ok: bool


class Run(NamedTuple):
    """What a case gave."""

    world: World
    saes: Dictionaries
    result: Result


def recovered(run: Run) -> float:
    """The share of deletion's effect that the atom takes back, at its coefficient."""
    wide = wide_firings(run.result)
    return recovered_share(wide["atom/coefficient"], wide["delete"], wide["sequence"]).mean


def atoms_found(run: Run) -> float:
    """Share of the planted atoms with a cosine above 0.9 with an atom of the dictionary."""
    (sae,) = run.saes.values()
    cosines = planted_atoms(run.world).cosines(sae.atoms())
    return float((cosines.max(1).values > 0.9).float().mean())


NUMBERS: dict[str, Callable[[Run], float]] = {"recovered": recovered, "atoms found": atoms_found}
"""Numbers that a case may bound."""


def run_case(case: Case) -> Iterator[Row]:
    """Run one case: a row for each claim and number that it names."""
    world = world_of(case.world)
    made = DICTIONARIES[case.dictionary](world)
    saes = made if isinstance(made, Mapping) else {"": made}
    evaluation = EVALUATIONS[case.kind].from_dict(SETTINGS[case.kind] | dict(case.settings))
    result = evaluation.run(world.model, saes, world.tokens, progress=False, or_skip=True)
    place = (case.kind, case.world, case.dictionary)
    claims = result.claims()
    for words, wanted in case.claims.items():
        claim = next((each for each in claims if words in each.claim), None)
        if claim is None:
            raise ValueError(f"{case.name}: no claim says {words!r}; there are {'; '.join(c.claim for c in claims)}")
        yield Row(*place, claim.claim, wanted, claim.outcome, claim.measured, fulfilled(claim, wanted))
    for name, (low, high) in case.numbers.items():
        number = NUMBERS[name](Run(world, saes, result))
        yield Row(*place, name, f"{low:g} to {high:g}", "", f"{number:.3f}", low <= number <= high)


def fulfilled(claim: Claim, wanted: Wanted) -> bool:
    """Whether a claim came out as it must. One that was not tested did not."""
    if wanted == "must not hold":
        return claim.outcome not in ("holds", "not tested")
    return claim.outcome == {"must hold": "holds", "must be confounded": "confounded"}[wanted]
