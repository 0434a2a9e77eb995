"""Run the checks of tests/reliability, count their comparisons, and write docs/reliability.md.

    python tools/reliability_page.py [--rounds X] [--only [CHECK ...]] [--out FOLDER]

The test suite runs the same checks with fewer rounds, and `tools/mutants/definitions.toml` has products that they must
catch. Numbers are saved in reliability.json, check by check, and the page is made from them (--only without a name:
from those that are there). Takes some five minutes of CPU time; --rounds 10 takes ten times as many rounds.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Literal, get_args

import torch
import tyro
from scipy.stats import binomtest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from reliability import folders, running, writing  # noqa: E402, F401 (they have checks)
from reliability.checks import CHECKS, Check  # noqa: E402
from tables import table  # noqa: E402

Name = Literal[tuple(check.name for check in CHECKS)]  # type: ignore[valid-type]
VERSIONS = ("torch", "transformers", "transformer-lens", "sae-lens", "safetensors", "tokenizers")


HEAD = """# Reliability

What happens with damaged files, interrupts, threads and kills? The {checks} checks below made {comparisons:,}
comparisons of an expected result with the one they got. {verdict}
`tools/reliability_page.py` made this page on {dates} with {versions}, on a CPU.

The test suite runs the same checks with fewer rounds (`tests/reliability`). `tools/mutants/definitions.toml` has broken
products that they must catch.
`python tools/reliability_page.py --rounds 10` makes about ten times as many comparisons.
"""


FOOT = """## Mutants

Small changes of syntax are drawn at random: a number plus one, a missing argument. The test suite notices \
{noticed:.1%} of {sample} such changes of the packages ({date}, seed {seed}; 95% interval \
{low:.0%} to {high:.0%}): {by_package}. `mutants.json` lists the {left} that it does not. {alike} of these change \
nothing that a user sees, and each says why; of the other {others} changes it notices {of_others:.1%}.

A change of meaning is harder to notice: a wrong sign, a value of another token, a unit left out. One such change was \
written for each of 100 functions before any change was tried. The functions were drawn over all rooms of the \
packages (2026-12-01, seed 20261201). The tests that there were noticed at least 50 of the changes; most changes had \
14 seconds of tests. Tests of definitions were then written for those that were left. Now 99 are noticed: 44 of 44 in \
hookpoints, 25 before; 19 of 19 in sae_lens_writesae, 10 before; 36 of 37 in writesae and the study, 15 before. The \
one that is left trains on columns of one sign where both are wanted, and a column has either sign by itself.

`tools/mutants/definitions.toml` lists the changes of meaning that the test suite notices, these and others."""


def measured(check: Check, rounds: float) -> dict[str, object]:
    """What came of a check."""
    begin = time.process_time()
    with tempfile.TemporaryDirectory() as work:
        found = list(check.run(Path(work, "whole"), max(round(check.many * rounds), 1)))
    return {
        "comparisons": len(found),
        "failures": [
            f"{each.what}: expected {each.expected}, got {each.got}"[:500] for each in found if not each.holds()
        ],
        "date": str(date.today()),
        "versions": {package: version(package) for package in VERSIONS},
        "seconds": round(time.process_time() - begin),
    }


def good(row: dict) -> bool:
    return not row["failures"]


def section(checks: list[Check], saved: dict[str, dict]) -> str:
    """What checks are, and what they found."""
    said = (f"- `{check.name}`: {' '.join((check.run.__doc__ or '').split())}\n" for check in checks)
    rows = [
        (
            f"`{check.name}`",
            f"{saved[check.name]['comparisons']:,}",
            len(saved[check.name]["failures"]),
        )
        for check in checks
    ]
    head = ("check", "comparisons", "failed")
    return "\n".join([f"## {checks[0].section}\n", "".join(said), table(head, rows)])


def page(saved: dict[str, dict]) -> str:
    """docs/reliability.md, with a line on mutation testing."""
    bad, told = (
        [name for name, row in saved.items() if not good(row)],
        json.loads(Path(ROOT, "docs/mutants.json").read_text()),
    )
    head = HEAD.format(
        dates=" and ".join(sorted({row["date"] for row in saved.values()})),
        versions=", ".join(map(" ".join, max(saved.values(), key=lambda row: row["date"])["versions"].items())),
        checks=len(saved),
        comparisons=sum(row["comparisons"] for row in saved.values()),
        verdict=f"These checks failed: **{', '.join(bad)}**." if bad else "No comparison failed.",
    )
    known = [check for check in CHECKS if check.name in saved]
    parts = [section(list(each), saved) for _, each in groupby(known, lambda check: check.section)]
    left, sample = len(told["survivors"]), told["sample"]
    alike = sum("equivalent" in row for row in told["survivors"])
    by_package = [f"{tried - lost} of {tried} in {name}" for name, (tried, lost) in told["packages"].items()]
    interval = binomtest(sample - left, sample).proportion_ci(method="wilson")
    foot = FOOT.format(
        **told,
        left=left,
        alike=alike,
        others=sample - alike,
        of_others=1 - (left - alike) / (sample - alike),
        noticed=1 - left / sample,
        low=interval.low,
        high=interval.high,
        by_package=", ".join(by_package),
    )
    return "\n".join([head, *parts, foot.rstrip(), ""])


def main(only: Sequence[Name] = get_args(Name), rounds: float = 1.0, out: Path = ROOT / "docs") -> int:
    """Run the checks and write the page; 1 where a comparison failed.

    Args:
        only: these checks
        rounds: part or multiple of the rounds
        out: folder of the page
    """
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "reliability.json"
    saved = json.loads(file.read_text()) if file.is_file() else {}
    for check in CHECKS:
        if check.name in only:
            row = saved[check.name] = measured(check, rounds)
            print(check.name, row, flush=True)
        saved = {each.name: saved[each.name] for each in CHECKS if each.name in saved}
        file.write_text(json.dumps(saved, indent=1) + "\n")
        (out / "reliability.md").write_text(page(json.loads(file.read_text())), encoding="utf-8")
    return 0 if all(map(good, saved.values())) else 1


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
