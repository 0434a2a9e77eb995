"""`writesae selftest`: run the cases, and say which came out as they must."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from writesae.settings import evaluations

if TYPE_CHECKING:
    from writesae.selftest.cases import Case


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
        if unknown := sorted(set(self.only) - evaluations().keys()):
            raise ValueError(f"no evaluation is called {', '.join(unknown)}; there are {', '.join(evaluations())}")

    def run(self, say: Callable[[str], object] = print) -> str:
        """Run the cases, a line for each claim as soon as it is there; SystemExit(1) where one is not as it must be."""
        from writesae.selftest.run import run_case

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
        from writesae.selftest.cases import CASES

        return [case for case in CASES if (not self.only or case.kind in self.only) and not (self.fast and case.slow)]


def line(cells: tuple[str, ...]) -> str:
    """One line of the table, cells cut to their columns."""
    return " | ".join(f"{cell[:width]:{width}}" for cell, width in zip(cells, _WIDTHS)).rstrip()


_WIDTHS = (12, 13, 22, 40, 18, 15, 50, 3)
