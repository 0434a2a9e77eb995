"""What every benchmark shares: ways timed in turn, what the page says of a number, the command line, the record.

A benchmark is a file of this folder with

    measure(**settings)         its numbers, as JSON has them; each parameter has a default and becomes a flag
    QUICK                       the settings of `--quick`: small sizes, to see that it runs
    TITLE                       its heading on docs/benchmarks.md (or else the beginning of its docstring)
    lines(figures)              what the page says of the numbers: `Line`s (or else every number by its names); lines
                                of one subject in several columns, such as models, are a row of the page's table
    text(figures)               optional: Markdown below this table

and `if __name__ == "__main__": frame.main(sys.modules[__name__])` at its end. The file alone prints its lines; `run.py`
runs all, keeps their records in docs/benchmarks and writes the page. Importing this file loads no torch.
"""

from __future__ import annotations

import argparse
import inspect
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

Way = Callable[[], object]
T = TypeVar("T")
DISTRIBUTIONS = ("torch", "transformers", "sae-lens")
MEASURED = "measured"
"""The column of what is measured on one thing alone."""


class Line(NamedTuple):
    """One number of the page."""

    what: str
    """The subject and its sizes, in words."""
    measured: float
    unit: str = ""
    goal: float | None = None
    least: bool = False
    """The goal is a lower bound."""
    column: str = MEASURED
    """Of the page's table: a model, or another thing that several lines of one subject are measured on."""

    @property
    def missed(self) -> bool:
        """It has a goal and does not meet it."""
        return self.goal is not None and (self.measured < self.goal if self.least else self.measured > self.goal)

    @property
    def bound(self) -> str:
        """The goal in words, empty where there is none."""
        if self.goal is None:
            return ""
        return ("at least " if self.least else "at most ") + number(self.goal) + self.unit

    @property
    def cell(self) -> str:
        """The number with its unit, and whether it misses its goal."""
        return number(self.measured) + self.unit + ", missed" * self.missed

    def cells(self) -> tuple[str, str, str]:
        """What, goal and measured, as a benchmark prints them."""
        subject = self.what if self.column == MEASURED else f"{self.column}: {self.what}"
        return subject, self.bound, self.cell


def lines(benchmark: Any, figures: dict[str, Any]) -> list[Line]:
    """What the page says of a benchmark's numbers."""
    if hasattr(benchmark, "lines"):
        return benchmark.lines(figures)
    return rest(figures)


def rows(of_lines: Iterable[Line]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table: a row for each subject and goal, a column for each thing that it was measured on."""
    by_row: dict[tuple[str, str], dict[str, str]] = {}
    columns: dict[str, None] = {}
    for line in of_lines:
        by_row.setdefault((line.what, line.bound), {})[line.column] = line.cell
        columns[line.column] = None
    has_goals = any(bound for _, bound in by_row)
    head = ["what", *["goal"] * has_goals, *columns]
    return head, [
        [what, *[bound] * has_goals, *(cells.get(column, "") for column in columns)]
        for (what, bound), cells in by_row.items()
    ]


def leaves(x: Any, names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    """Every number in nested dictionaries, with its names."""
    if isinstance(x, dict):
        for name, each in x.items():
            yield from leaves(each, (*names, name))
    elif isinstance(x, int | float):
        yield names, x


def rest(figures: Any, unit: str = "") -> list[Line]:
    """Every number by its names, without a goal."""
    return [Line(", ".join(names), value, unit) for names, value in leaves(figures)]


def number(x: float) -> str:
    """Two digits, or all before the point."""
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}" if abs(x) >= 0.1 else f"{x:.2g}"


def timed(ways: dict[str, Way], rounds: int, warm: bool = True) -> dict[str, dict[str, float]]:
    """Ways of doing one thing, timed in turn, round after round, by the clock of this process, which other programs
    disturb least: the least milliseconds of each, and the median over rounds of its ratio to the first.

    `warm` calls each once before."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values() if warm else ():
        way()
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            way()
            times[name].append(1e3 * (time.process_time() - start))
    first = times[next(iter(ways))]
    return {
        name: {"ms": min(own), "ratio": statistics.median(a / b for a, b in zip(own, first))}
        for name, own in times.items()
    }


def apart(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function of a module in its own process, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def peak_memory() -> int:
    """Bytes of this process's largest resident set so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def machine() -> dict[str, Any]:
    """What a number depends on and the code does not say."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": models[0].partition(": ")[2] if models else platform.machine(),
        "cores": os.cpu_count(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", "1")),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in DISTRIBUTIONS},
    }


def kind(default: Any) -> dict[str, Any]:
    """How argparse reads a setting like its default; a tuple takes one or more."""
    if isinstance(default, bool):
        return {"action": argparse.BooleanOptionalAction}
    return {"type": type(default[0]), "nargs": "+"} if isinstance(default, tuple) else {"type": type(default)}


def main(benchmark: Any, arguments: list[str] | None = None) -> None:
    """The command line of one benchmark."""
    parser = argparse.ArgumentParser(
        description=benchmark.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, parameter in inspect.signature(benchmark.measure).parameters.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **kind(parameter.default), default=parameter.default)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--json", type=Path, help="file for the record")
    if "--quick" in (sys.argv if arguments is None else arguments):
        parser.set_defaults(**getattr(benchmark, "QUICK", {}))
    settings = vars(parser.parse_args(arguments))
    quick, file = settings.pop("quick"), settings.pop("json")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that the benchmark starts
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    began, record = time.perf_counter(), machine() | {"quick": quick, "settings": settings}
    figures = json.loads(json.dumps(benchmark.measure(**settings)))  # as the page will read it
    for line in lines(benchmark, figures):
        print(" | ".join(line.cells()))
    if file:
        from hookpoints.files import atomic_text

        seconds = time.perf_counter() - began
        record |= {"seconds": round(seconds, 1), "found": rounded(figures)}
        atomic_text(file, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def rounded(x: Any) -> Any:
    """With numbers to five digits."""
    if isinstance(x, dict):
        return {name: rounded(each) for name, each in x.items()}
    if isinstance(x, list):
        return [rounded(each) for each in x]
    return float(f"{x:.5g}") if isinstance(x, float) else x
