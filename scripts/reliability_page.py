"""Run the checks of tests/reliability, count their comparisons, and write docs/reliability.md.

    python scripts/reliability_page.py [--rounds X] [--only [CHECK ...]] [--out FOLDER]

Each check runs with the product as it is, and then with each broken product that it must catch. The test suite does the
same with fewer rounds. Numbers are saved in reliability.json, check by check, and the page is made from them (--only
without a name: from those that are there). Takes some ten minutes of CPU time; --rounds 10 takes ten times as many
rounds.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from reliability import folders, long, running, writing  # noqa: E402, F401 (they have checks)
from reliability.checks import CHECKS, Check, Most  # noqa: E402

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


def mutants(file: Path) -> list[str]:
    """One line on mutation testing, where it was run."""
    if not file.is_file():
        return []
    told = json.loads(file.read_text())
    left, when = len(told["survivors"]), f"{told['date']}, seed {told['seed']}"
    text = f"The test suite notices {1 - left / told['sample']:.1%} of {told['sample']} random changes of the packages"
    rest = f"({when}). `mutants.json` lists the {left} that it does not. {told.get('remark', '')}"
    return ["", "## Mutants", "", f"{text} {rest}".rstrip()]


def page(saved: dict[str, dict], out: Path) -> str:
    bad = [name for name, row in saved.items() if not good(row)]
    latest = max(saved.values(), key=lambda row: row["date"])
    used = ", ".join(f"{name} {number}" for name, number in latest["versions"].items())
    dates = " and ".join(sorted({row["date"] for row in saved.values()}))
    comparisons = sum(row["comparisons"] for row in saved.values())
    broken = sum(len(row["caught"]) for row in saved.values())
    verdict = "No comparison failed, and every broken product was caught."
    lines = [
        "# Reliability",
        "",
        f"`scripts/reliability_page.py` made this page on {dates} with {used}, on a CPU.",
        f"The {len(saved)} checks below made {comparisons:,} comparisons of an expected result with the one they got.",
        f"They also ran with {broken} broken products, each of which its check must catch.",
        f"These checks failed: **{', '.join(bad)}**." if bad else verdict,
        "",
        "The test suite runs the same checks with fewer rounds (`tests/reliability`).",
        "`python scripts/reliability_page.py --rounds 10` makes about ten times as many comparisons.",
    ]
    for section in dict.fromkeys(check.section for check in CHECKS if check.name in saved):
        checks = [check for check in CHECKS if check.section == section and check.name in saved]
        lines += ["", f"## {section}", ""]
        lines += [f"- `{check.name}`: {' '.join((check.run.__doc__ or '').split())}" for check in checks]
        lines += ["", "| check | comparisons | failed | broken products that it caught |", "|---|---|---|---|"]
        numbers = {}
        for check in checks:
            row = saved[check.name]
            numbers |= row["numbers"]
            caught = "; ".join(each if yes else f"**not caught: {each}**" for each, yes in row["caught"].items())
            lines.append(f"| `{check.name}` | {row['comparisons']:,} | {len(row['failures'])} | {caught} |")
        if numbers:
            lines += ["", "| measured | got | at most |", "|---|---|---|"]
            lines += [f"| {what} | {got:.3g} | {most:g} |" for what, (got, most) in numbers.items()]
    return "\n".join([*lines, *mutants(out / "mutants.json")]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=[check.name for check in CHECKS])
    parser.add_argument("--rounds", type=float, default=1.0, help="part or multiple of the rounds")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "reliability.json"
    saved = json.loads(file.read_text()) if file.is_file() else {}
    for check in CHECKS:
        if arguments.only is None or check.name in arguments.only:
            row = saved[check.name] = measured(check, arguments.rounds)
            print(
                check.name, {name: row[name] for name in ("comparisons", "failures", "caught", "seconds")}, flush=True
            )
        saved = {each.name: saved[each.name] for each in CHECKS if each.name in saved}
        file.write_text(json.dumps(saved, indent=1) + "\n")
        (arguments.out / "reliability.md").write_text(
            page(json.loads(file.read_text()), arguments.out), encoding="utf-8"
        )
    return 0 if all(map(good, saved.values())) else 1


if __name__ == "__main__":
    sys.exit(main())
