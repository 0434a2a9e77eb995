"""`writesae selftest`: run the cases, and say which came out as they must."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from sae_lens_writesae.evaluations import EVALUATIONS
from sae_lens_writesae.evaluations.substitution import wide_firings
from sae_lens_writesae.experiment.result import Claim, Result
from sae_lens_writesae.selftest.cases import CASES, SETTINGS, Case, Wanted
from sae_lens_writesae.selftest.dictionaries import DICTIONARIES, Dictionaries, planted_atoms
from sae_lens_writesae.selftest.worlds import World, world_of
from sae_lens_writesae.verdict.statistics import recovered_share


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
    result = evaluation.run_or_skip(world.model, saes, world.tokens, progress=False)
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


@dataclass(frozen=True, kw_only=True)
class SelfTest:
    """Run every evaluation in worlds whose truth is known: claims must hold where they are planted, and must not where
    there is nothing, or where a control explains the effect. Offline, on a CPU, in minutes. The status is 1 where a
    case does not come out as it must."""

    only: tuple[str, ...] = ()
    """Evaluations to test; all by default."""
    fast: bool = False
    """Leave out the cases for which a dictionary is trained (half a minute each)."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.only) - set(EVALUATIONS)):
            raise ValueError(f"no evaluation is called {', '.join(unknown)}; there are {', '.join(EVALUATIONS)}")

    def run(self, say: Callable[[str], object] = print) -> str:
        """Run the cases, a line for each claim as soon as it is there; SystemExit(1) where one is not as it must be."""
        begin, rows = time.perf_counter(), []
        say(line(("evaluation", "world", "dictionary", "claim", "expected", "outcome", "measured", "ok")))
        for case in self.cases():
            for row in run_case(case):
                say(line((*row[:-1], "yes" if row.ok else "NO")))
                rows.append(row)
        wrong = sum(not row.ok for row in rows)
        seconds = time.perf_counter() - begin
        say(f"{len(rows) - wrong} of {len(rows)} as they must be, in {seconds:.0f} s")
        if wrong:
            raise SystemExit(1)
        return "Every claim came out as it must."

    def cases(self) -> list[Case]:
        """The cases that are run."""
        return [case for case in CASES if (not self.only or case.kind in self.only) and not (self.fast and case.slow)]


def line(cells: tuple[str, ...]) -> str:
    """One line of the table, cells cut to their columns."""
    return " | ".join(f"{cell[:width]:{width}}" for cell, width in zip(cells, _WIDTHS)).rstrip()


_WIDTHS = (12, 13, 22, 40, 18, 15, 50, 3)
