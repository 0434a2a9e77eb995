"""Mutation testing: of the changes that mutmut makes to one place of the packages, how many does no test notice?

    python tests/mutants/run.py [--sample N] [--seed S] [--only TEXT] [--jobs N] [--out FOLDER] [--kept FOLDER]

It lists every mutant of both packages and draws a seeded sample: places first, then one mutant of each, for a call has
two mutants for each of its arguments, and most of them fail at once. Each is tried in a copy of the checkout, with the
tests that mirror its module: ``hookpoints/edits/edit.py`` has the folder ``tests/hookpoints/edits``,
``sae_lens_writesae/push.py`` has ``tests/test_push.py``, and a module without either has the test files that import it.
These run once unchanged, which shows the tests that execute each line; a mutant gets those alone. It is *killed* if
one of them fails, or if they take three times as long as all of them did. ``mutants.json`` gets the rate and the
survivors. Needs the extra ``nightly``: mutmut brings a terminal interface, which no other test needs.

The operators are those of mutmut: numbers, comparisons, arithmetic, ``and``, ``or``, ``not``, ``break``, ``continue``,
assignments, each argument of each call, lambdas, conditional expressions, cases of ``match``. Left out are

* strings: prose or names. A test for prose repeats it; a wrong name fails at once and would only flatter the rate;
* ``raise`` and ``warn``: all but their text is in the condition before them, which is mutated;
* annotations, ``TYPE_CHECKING``, ``cast``, ``TypeVar``: never executed, or without an effect;
* ``len`` and ``isinstance``, which mutmut leaves out too: any other argument is a TypeError;
* decorators and imports: without them the module cannot be imported.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import coverage
import libcst as cst
import libcst.matchers as m
import pytest
from hypothesis import Phase, settings
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators, operator_string

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("hookpoints", "sae_lens_writesae")
PRELOADED = ["torch", "pandas", "scipy.stats", "transformers", "transformer_lens", "sae_lens"]
"""Imported once: each run of the tests is forked from a process that has them, which saves most of its time."""
PRELOADED += ["hypothesis", "pytest", "coverage", "libcst.metadata", "mutmut.mutation.mutators"]
LEFT_OUT = (cst.Annotation, cst.Decorator, cst.Import, cst.ImportFrom, cst.Raise)
CALLS_LEFT_OUT = m.Call(
    func=m.OneOf(*map(m.Name, ("cast", "TypeVar", "len", "isinstance"))) | m.Attribute(attr=m.Name("warn"))
)
TYPING = m.If(test=m.Name("TYPE_CHECKING"))


class Mutant(NamedTuple):
    """A change of a file: `before`, at the lines `first` to `last`, became `after`."""

    file: str
    first: int
    last: int
    operator: str
    before: str
    after: str
    source: str

    def __str__(self) -> str:
        return f"{self.file}:{self.first} {self.operator}: {self.before[:80]} -> {self.after[:80]}"


class Places(cst.CSTVisitor):
    """Collects (node, its mutants with the names of their operators) of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[cst.CSTNode, list[tuple[str, cst.CSTNode]]]] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, LEFT_OUT) or m.matches(node, CALLS_LEFT_OUT) or m.matches(node, TYPING):
            return False
        operators = [use for kind, use in mutation_operators if isinstance(node, kind) and use is not operator_string]
        mutants = [(use.__name__.removeprefix("operator_"), mutated) for use in operators for mutated in use(node)]
        self.found += [(node, mutants)] if mutants else []
        return True


def draw(files: list[str], n: int, seed: int) -> tuple[list[Mutant], int]:
    """A sample of mutants, and the number of all of them."""
    counts, chance = {}, random.Random(seed)
    for file in files:
        cst.parse_module((ROOT / file).read_text("utf-8")).visit(places := Places())
        counts[file] = [len(mutants) for _, mutants in places.found]
    every = [(file, i) for file in files for i in range(len(counts[file]))]
    drawn = [(file, i, chance.randrange(counts[file][i])) for file, i in chance.sample(every, min(n, len(every)))]
    return [make(*place) for place in drawn], sum(map(sum, counts.values()))


def make(file: str, place: int, which: int) -> Mutant:
    tree, places = MetadataWrapper(cst.parse_module((ROOT / file).read_text("utf-8"))), Places()
    tree.module.visit(places)
    node, mutants = places.found[place]
    operator, mutated = mutants[which]
    lines, changed = tree.resolve(PositionProvider)[node], tree.module.deep_replace(node, mutated)
    assert isinstance(changed, cst.Module)
    before, after = (" ".join(tree.module.code_for_node(each).split()) for each in (node, mutated))
    return Mutant(file, lines.start.line, lines.end.line, operator, before, after, changed.code)


def mirror(file: str) -> tuple[str, ...]:
    """The test files of a module, those with its name first."""
    package, *names = Path(file).with_suffix("").parts
    home = ROOT / "tests" / ("hookpoints" if package == "hookpoints" else "")
    found = sorted(home.glob(f"test_{names[0]}*.py"))
    if len(names) > 1 and (home / names[0]).is_dir():
        found = sorted((home / names[0]).glob("test_*.py"))
    importing = re.compile(rf"\b{package}\.{names[0]}\b|from {package} import .*\b{names[0]}\b")
    found = found or [test for test in sorted(home.rglob("test_*.py")) if importing.search(test.read_text("utf-8"))]
    found = found or sorted(home.glob("test_cli.py") if home.name == "tests" else home.glob("layer/test_*.py"))
    found.sort(key=lambda test: not test.stem.startswith(f"test_{names[-1]}"))
    return tuple(str(test.relative_to(ROOT)) for test in found)


class Watched:
    """A plugin of pytest that notes which test executes which line. What a fixture executes is of its whole file."""

    def __init__(self, to: Path) -> None:
        self.measured = coverage.Coverage(data_file=to, source=list(PACKAGES), config_file=False)
        self.measured.set_option("run:relative_files", True)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.measured.switch_context(nodeid.partition("::")[0])

    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> None:
        self.measured.switch_context(pyfuncitem.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.measured.switch_context(report.nodeid.partition("::")[0])

    def pytest_runtest_logfinish(self) -> None:
        self.measured.switch_context("")


def run_tests(root: Path, tests: list[str], timeout: float | None = None, watch: Path | None = None) -> int | None:
    """pytest's exit status in a copy; None if it took too long."""
    child = multiprocessing.get_context("forkserver").Process(target=_run_here, args=(root, tests, watch))
    child.start()
    child.join(timeout)
    if child.exitcode is None:
        child.kill()
        child.join()
        return None
    return child.exitcode


def _run_here(root: Path, tests: list[str], watch: Path | None) -> None:
    """In the forked process: pytest in the copy, all that is printed into a file."""
    os.chdir(root)
    with Path("output.txt").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    multiprocessing.set_start_method("fork", force=True)  # the default of a process of its own
    sys.path.insert(0, str(root))
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    assert not set(PACKAGES) & set(sys.modules), "a preloaded module has imported the packages: no copy would be tested"
    # Any failing example will do; looking for the smallest one would take most of the time.
    settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate], database=None)
    settings.load_profile("mutants")
    options = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of plugins that are imported beforehand
    if watch:
        watched = Watched(watch)
        with watched.measured.collect():
            status = pytest.main([*options, *tests], plugins=[watched])
        watched.measured.save()
    else:
        status = pytest.main([*options, *tests])
    sys.stdout.flush()
    os._exit(status)


def notes(tests: tuple[str, ...], kept: Path) -> Path:
    """The folder for what is known of test files."""
    return kept / hashlib.sha256(" ".join(sorted(tests)).encode()).hexdigest()[:16]


def learn(tests: tuple[str, ...], copies: SimpleQueue[Path], kept: Path) -> None:
    """Run tests in the unchanged copy, unless that is done: which lines they execute, and how long they take."""
    folder, root, begin = notes(tests, kept), copies.get(), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "seconds").exists():
        if run_tests(root, [*tests], watch=folder / "lines"):
            raise SystemExit(f"without any mutant {tests} do not pass:\n{(root / 'output.txt').read_text()[-3000:]}")
        (folder / "seconds").write_text(f"{time.monotonic() - begin:.0f}")
        print(f"unchanged {time.monotonic() - begin:4.0f} s  {Path(tests[0]).parent}", flush=True)
    copies.put(root)


def executing(mutant: Mutant, tests: tuple[str, ...], kept: Path) -> list[str]:
    """The tests that execute the changed lines; all of them if an import executes them, or nothing does."""
    data = coverage.CoverageData(str(notes(tests, kept) / "lines"))
    data.read()
    executed = data.contexts_by_lineno(mutant.file)
    lines = [line for line in range(mutant.first, mutant.last + 1) if line in executed]
    lines = lines or [max((line for line in executed if line < mutant.first), default=0)]
    found = {test for line in lines for test in executed.get(line, [""])}
    return [*tests] if "" in found else sorted(found, key=lambda test: (tests.index(test.partition("::")[0]), test))


def try_mutant(mutant: Mutant, copies: SimpleQueue[Path], kept: Path) -> bool:
    """Whether it survives."""
    root, tests, begin = copies.get(), mirror(mutant.file), time.monotonic()
    unchanged = (root / mutant.file).read_text("utf-8")
    (root / mutant.file).write_text(mutant.source, "utf-8")
    limit = 60 + 3 * float((notes(tests, kept) / "seconds").read_text())
    # 1: a test failed; 2 to 4: the module or a conftest cannot be imported; None: it took too long.
    survives = run_tests(root, executing(mutant, tests, kept), limit) == 0
    said = (root / "output.txt").read_text("utf-8", "replace").strip().splitlines()
    (root / mutant.file).write_text(unchanged, "utf-8")
    copies.put(root)
    why = next((line for line in said if line.startswith(("FAILED", "ERROR"))), said[-1] if said else "")
    print(
        f"{'SURVIVES' if survives else 'killed':8} {time.monotonic() - begin:5.0f} s  {mutant}  {why[:90]}", flush=True
    )
    return survives


def markdown(result: dict[str, Any]) -> str:
    """The lines of a page that say what came of a run."""
    killed = 1 - result["survived"] / result["sample"]
    head = (
        f"{result['date']}, mutmut {result['mutmut']}: of {result['mutants']:,} mutants, {result['sample']} were drawn "
        f"(seed {result['seed']}); the tests kill {killed:.1%}, and {result['survived']} survive."
    )
    rows = [f"| {name} | {n['sample']} | {n['survived']} |" for name, n in result["operators"].items()]
    left = [f"- `{s['file']}:{s['line']}` ({s['operator']}): `{s['change']}`" for s in result["survivors"]]
    return "\n".join([head, "", "| operator | drawn | survived |", "|---|---|---|", *rows, "", *left])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=200, help="mutants to try")
    parser.add_argument("--seed", type=int, default=int(f"{date.today():%Y%m%d}"), help="of the sample; default: today")
    parser.add_argument("--only", default="", help="files with this text in their path")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at once, each in a copy of its own")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder for mutants.json")
    parser.add_argument("--kept", type=Path, help="folder in which to keep what the tests execute, for the next run")
    parser.add_argument("--most", type=float, default=1, help="share of survivors above which the exit status is 1")
    arguments = parser.parse_args()
    files = [str(f.relative_to(ROOT)) for package in PACKAGES for f in sorted((ROOT / package).rglob("*.py"))]
    mutants, n = draw([file for file in files if arguments.only in file], arguments.sample, arguments.seed)
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        copies = SimpleQueue[Path]()
        for i in range(arguments.jobs):
            ignored = shutil.ignore_patterns(".git", "__pycache__", ".*_cache")
            copies.put(shutil.copytree(ROOT, Path(folder, str(i)), ignore=ignored))
        common = {"copies": copies, "kept": arguments.kept or Path(folder, "kept")}
        mirrors = {frozenset(tests): tests for tests in map(mirror, (mutant.file for mutant in mutants))}
        list(pool.map(partial(learn, **common), mirrors.values()))
        survivors = [
            mutant for mutant, survives in zip(mutants, pool.map(partial(try_mutant, **common), mutants)) if survives
        ]
    tried, left = (Counter(mutant.operator for mutant in each) for each in (mutants, survivors))
    result = {
        "date": f"{date.today()}",
        "mutmut": version("mutmut"),
        "seed": arguments.seed,
        "mutants": n,
        "sample": len(mutants),
        "survived": len(survivors),
        "operators": {name: {"sample": tried[name], "survived": left[name]} for name in sorted(tried)},
        "survivors": [
            {
                "file": each.file,
                "line": each.first,
                "operator": each.operator,
                "change": f"{each.before} -> {each.after}",
            }
            for each in survivors
        ],
    }
    (arguments.out / "mutants.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(markdown(result))
    return int(len(survivors) > arguments.most * len(mutants))


if __name__ == "__main__":
    sys.exit(main())
