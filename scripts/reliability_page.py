"""Run the checks of tests/reliability, count their comparisons, and write docs/reliability.md.

    python scripts/reliability_page.py [--rounds X] [--only [CHECK ...]] [--out FOLDER]

Each check runs with the product as it is, and then with each broken product that it must catch. The test suite does the
same with fewer rounds. Numbers are saved in reliability.json, check by check, and the page is made from them (--only
without a name: from those that are there). Takes some ten minutes of CPU time; --rounds 10 takes ten times as many
rounds.
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
from pathlib import Path
from typing import Literal, get_args

import torch
import tyro

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from reliability import folders, long, running, writing  # noqa: E402, F401 (they have checks)
from reliability.checks import CHECKS, Check, Most  # noqa: E402
from tables import table  # noqa: E402

Name = Literal[tuple(check.name for check in CHECKS)]  # type: ignore[valid-type]
VERSIONS = ("torch", "transformers", "transformer-lens", "sae-lens", "safetensors", "tokenizers")


def measured(check: Check, rounds: float) -> dict[str, object]:
    """What the product as it is and the broken ones led to."""
    begin = time.process_time()
    n = max(round(check.many * rounds), 1)
    with tempfile.TemporaryDirectory() as work:
        found = list(check.run(Path(work), n))
    caught = {}
    for name in check.broken:
        with tempfile.TemporaryDirectory() as work:
            caught[name] = check.catches(name, Path(work))
    return {
        "comparisons": len(found),
        "failures": [
            f"{each.what}: expected {each.expected}, got {each.got}"[:500] for each in found if not each.holds()
        ],
        "numbers": {each.what: [each.got, float(each.expected)] for each in found if isinstance(each.expected, Most)},
        "caught": caught,
        "date": str(date.today()),
        "versions": {package: version(package) for package in VERSIONS},
        "seconds": round(time.process_time() - begin),
    }


def good(row: dict) -> bool:
    return not row["failures"] and all(row["caught"].values())


def shown(row: dict) -> tuple[str, int, str]:
    """Comparisons, failures, and the broken products that were caught or not."""
    caught = "; ".join(each if yes else f"**not caught: {each}**" for each, yes in row["caught"].items())
    return f"{row['comparisons']:,}", len(row["failures"]), caught


def mutants(file: Path) -> list[str]:
    """One line on mutation testing, where it was run."""
    if not file.is_file():
        return []
    told = json.loads(file.read_text())
    left, when = len(told["survivors"]), f"{told['date']}, seed {told['seed']}"
    text = (
        f"The test suite notices {1 - left / told['sample']:.1%} of {told['sample']} random changes of the packages "
        f"({when}). `mutants.json` lists the {left} that it does not. {told.get('remark', '')}"
    )
    return ["", "## Mutants", "", text.rstrip()]


def page(saved: dict[str, dict], out: Path) -> str:
    bad = [name for name, row in saved.items() if not good(row)]
    dates = sorted({row["date"] for row in saved.values()})
    latest = next(row["versions"] for row in saved.values() if row["date"] == dates[-1]).items()
    comparisons, broken = (sum(each) for each in zip(*((r["comparisons"], len(r["caught"])) for r in saved.values())))
    lines = [
        "# Reliability",
        "",
        f"`scripts/reliability_page.py` made this page on {' and '.join(dates)} with "
        + ", ".join(map(" ".join, latest))
        + ", on a CPU.",
        f"The {len(saved)} checks below made {comparisons:,} comparisons of an expected result with the one they got.",
        f"They also ran with {broken} broken products, each of which its check must catch.",
        f"These checks failed: **{', '.join(bad)}**."
        if bad
        else "No comparison failed, and every broken product was caught.",
        "",
        "The test suite runs the same checks with fewer rounds (`tests/reliability`).",
        "`python scripts/reliability_page.py --rounds 10` makes about ten times as many comparisons.",
    ]
    for section in dict.fromkeys(check.section for check in CHECKS if check.name in saved):
        checks = [check for check in CHECKS if check.section == section and check.name in saved]
        lines += ["", f"## {section}", ""]
        lines += [f"- `{check.name}`: {' '.join((check.run.__doc__ or '').split())}" for check in checks]
        rows = [(f"`{check.name}`", *shown(saved[check.name])) for check in checks]
        lines += ["", table(("check", "comparisons", "failed", "broken products that it caught"), rows).rstrip()]
        numbers = {what: pair for check in checks for what, pair in saved[check.name]["numbers"].items()}
        rows = [(what, f"{got:.3g}", f"{most:g}") for what, (got, most) in numbers.items()]
        lines += ["", table(("measured", "got", "at most"), rows).rstrip()] if rows else []
    return "\n".join([*lines, *mutants(out / "mutants.json")]) + "\n"


def main(only: Sequence[Name] = get_args(Name), rounds: float = 1.0, out: Path = ROOT / "docs") -> int:
    """Run the checks and write the page; 1 where a comparison failed or a broken product was not caught.

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
            print(
                check.name, {name: row[name] for name in ("comparisons", "failures", "caught", "seconds")}, flush=True
            )
        saved = {each.name: saved[each.name] for each in CHECKS if each.name in saved}
        file.write_text(json.dumps(saved, indent=1) + "\n")
        (out / "reliability.md").write_text(page(json.loads(file.read_text()), out), encoding="utf-8")
    return 0 if all(map(good, saved.values())) else 1


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
