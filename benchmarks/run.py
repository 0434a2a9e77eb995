"""Run every benchmark, or those that are named, and write docs/benchmarks.md from their records.

    python benchmarks/run.py [NAME ...]      an hour for all; records go to docs/benchmarks/NAME.json (gpu: `.ci/gpu`)
    python benchmarks/run.py --quick         small sizes, minutes; records and page go to a folder that is printed
    python benchmarks/run.py --page          the page alone, from the records that are there

Each runs in its own process with one thread. One that fails leaves its former record, which the page shows with
its date, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tools")]

import frame  # noqa: E402
from tables import table  # noqa: E402

from hookpoints.files import atomic_text  # noqa: E402

NAMES = (
    *("launches", "scan", "hooks", "substitution", "sae_step", "real_size"),
    *("circuits", "task_circuits", "natural_memory", "read_back", "forgetting", "facts_in_speech"),
)
"""The benchmarks, as the page has them."""
ON_GPU = "gpu"
"""One more, which runs only where it is named."""
HEAD = """# Benchmarks

What do hooks, edits, memories and training cost, and how often are readers and circuits right? Each section is one
claim. `python benchmarks/run.py` measures it and writes this page; `docs/benchmarks` has a record of each, with all
numbers and settings. Times are those of one CPU thread, by its own clock. A ratio is the median over rounds of ways
that take turns. Other programs shared the machine, so trust ratios more than times, and not the second digit.
{goals}
"""
FOOT = """*{date}, {cpu}, load {load:.0f}, torch {torch}, transformers {transformers}, SAELens {sae-lens};
`python benchmarks/run.py {name}`, {seconds:.0f} s.*
"""


def section(name: str, record: dict[str, Any]) -> tuple[str, list[frame.Line]]:
    """A benchmark's part of the page, and its lines."""
    own, figures = importlib.import_module(name), record["found"]
    lines = frame.lines(own, figures)
    parts = [f"## {getattr(own, 'TITLE', name)}"]
    parts += ["**Small sizes**, to see that it runs."] if record["quick"] else []
    parts += [table(*frame.rows(lines))] if lines else []
    parts += [own.text(figures)] if hasattr(own, "text") else []
    parts += [FOOT.format(**record, name=name)]
    return "\n".join(f"{part.strip()}\n" for part in parts), lines


def goals_met(lines: list[frame.Line]) -> str:
    """How many goals are met, as a sentence."""
    goals = [line for line in lines if line.goal is not None]
    return f"Of {len(goals)} goals {sum(not line.missed for line in goals)} are met."


def records(folder: Path, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The records that are there."""
    files = {name: folder / f"{name}.json" for name in names}
    return {name: json.loads(file.read_text("utf-8")) for name, file in files.items() if file.exists()}


def page(folder: Path, names: tuple[str, ...] = (*NAMES, ON_GPU)) -> str:
    """docs/benchmarks.md from the records in a folder."""
    made = [section(name, record) for name, record in records(folder, names).items()]
    goals = goals_met([line for _, lines in made for line in lines])
    return "\n".join([HEAD.format(goals=goals), *(text for text, _ in made)])


def write(docs: Path) -> None:
    """The page."""
    atomic_text(docs / "benchmarks.md", page(docs / "benchmarks"))


def run(names: tuple[str, ...], docs: Path, quick: bool) -> list[str]:
    """Run benchmarks one after another; gives the names of those that failed."""
    failed = []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    for name in names:
        record = docs / "benchmarks" / f"{name}.json"
        print(f"-- {name}", flush=True)
        command = [sys.executable, __file__, "--one", name, "--json", str(record), *["--quick"] * quick]
        if code := subprocess.run(command, env=environment, check=False).returncode:
            former = f"its record of {json.loads(record.read_text())['date']} stays" if record.exists() else "no record"
            print(f"-- {name} FAILED (exit code {code}): {former}", flush=True)
            failed.append(name)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join((*NAMES, ON_GPU)))
    parser.add_argument("--quick", action="store_true", help="small sizes; leaves docs as it is")
    parser.add_argument("--page", action="store_true", help="run nothing")
    options = parser.parse_args()
    if unknown := set(options.names) - {*NAMES, ON_GPU}:
        parser.error(f"expected names out of {', '.join((*NAMES, ON_GPU))}; got {', '.join(sorted(unknown))}")
    docs = Path(tempfile.mkdtemp(prefix="benchmarks-")) if options.quick else DOCS
    failed = [] if options.page else run(tuple(options.names) or NAMES, docs, options.quick)
    write(docs)
    print(docs / "benchmarks.md")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        frame.main(importlib.import_module(sys.argv[2]), sys.argv[3:])
    else:
        main()
