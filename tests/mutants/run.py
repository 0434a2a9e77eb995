"""Mutation testing: of the changes that mutmut makes to one place of the packages, how many does no test notice?

    python tests/mutants/run.py [--sample N] [--seed S] [--only TEXT] [--out FOLDER]

It lists every mutant of both packages and draws a seeded sample: places first, then one mutant of each, for a call has
two mutants for each of its arguments, and most of them fail at once. Each is tried in a copy of the checkout, with the
tests that mirror its module: ``hookpoints/edits/edit.py`` has the folder ``tests/hookpoints/edits``,
``writesae/push.py`` has ``tests/test_push.py``, and a module without either has the test files that import it.
These run once unchanged, which shows the tests that execute each line; a mutant gets those alone (of a line that runs
as its module is imported, those that execute anything of the module). It is *killed* if one of them fails, or if they
take three times as long as all of them did. ``mutants.json`` gets the rate and the survivors. Needs the extra
``nightly``, which is apart from ``test`` because mutmut brings a terminal interface.

The operators are those of mutmut: numbers, comparisons, arithmetic, ``and``, ``or``, ``not``, ``break``, ``continue``,
assignments, each argument of each call, lambdas, conditional expressions, cases of ``match``. Left out are

* numbers from 100 on: mutmut adds 1, and a chunk or a text of 4,097 tokens is as good as one of 4,096;
* strings: prose or names. A test for prose repeats it; a wrong name fails at once and would only flatter the rate;
* ``raise`` and ``warn``: all but their text is in the condition before them, which is mutated;
* annotations, ``TYPE_CHECKING``, ``cast``, ``TypeVar``: never executed, or without an effect;
* ``len`` and ``isinstance``, which mutmut leaves out too: any other argument is a TypeError;
* decorators and imports: without them the module cannot be imported;
* ``hookpoints/fla``, unless flash-linear-attention is installed: its tests are skipped without.
"""

from __future__ import annotations

import functools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import coverage
import libcst as cst
import libcst.matchers as m
import tyro
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators, operator_string

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("hookpoints", "sae_lens_writesae")
ALSO = {"layer": "hooks"}
"""Rooms whose tests are those of another one, too: hooks fire in layers."""
LEFT_OUT = (cst.Annotation, cst.Decorator, cst.Import, cst.ImportFrom, cst.Raise)
CALLS_LEFT_OUT = m.Call(
    func=m.OneOf(*map(m.Name, ("cast", "TypeVar", "len", "isinstance"))) | m.Attribute(attr=m.Name("warn"))
)
MANY = m.Integer(value=m.MatchIfTrue(lambda digits: int(digits, 0) >= 100))
TYPING = m.If(test=m.Name("TYPE_CHECKING"))


class Mutant(NamedTuple):
    """A change of a file at the lines `first` to `last`; `source` is the whole file after it."""

    file: str
    first: int
    last: int
    operator: str
    change: str
    source: str


class Places(cst.CSTVisitor):
    """The places of a file that have mutants: (node, its mutants with the names of their operators)."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self.found: list[tuple[cst.CSTNode, list[tuple[str, cst.CSTNode]]]] = []
        self.tree = MetadataWrapper(cst.parse_module((ROOT / file).read_text("utf-8")))
        self.tree.module.visit(self)

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, LEFT_OUT) or m.matches(node, CALLS_LEFT_OUT | TYPING | MANY):
            return False
        operators = [use for kind, use in mutation_operators if isinstance(node, kind) and use is not operator_string]
        mutants = [(use.__name__.removeprefix("operator_"), mutated) for use in operators for mutated in use(node)]
        self.found += [(node, mutants)] if mutants else []
        return True


def draw(files: list[str], n: int, seed: int) -> tuple[list[Mutant], int]:
    """A sample of mutants, and the number of all of them."""
    counts = {file: [len(mutants) for _, mutants in Places(file).found] for file in files}
    places, chance = [(file, i) for file in files for i in range(len(counts[file]))], random.Random(seed)
    drawn = [(file, i, chance.randrange(counts[file][i])) for file, i in chance.sample(places, min(n, len(places)))]
    return [make(*place) for place in drawn], sum(map(sum, counts.values()))


def make(file: str, place: int, which: int) -> Mutant:
    places = Places(file)
    (node, mutants), module = places.found[place], places.tree.module
    operator, mutated = mutants[which]
    lines, changed = places.tree.resolve(PositionProvider)[node], module.deep_replace(node, mutated)
    assert isinstance(changed, cst.Module)
    change = " -> ".join(" ".join(module.code_for_node(each).split()) for each in (node, mutated))
    return Mutant(file, lines.start.line, lines.end.line, operator, change, changed.code)


def mirror(file: str) -> tuple[str, ...]:
    """The test files of a module, those with its name first."""
    package, *names = Path(file).with_suffix("").parts
    home = ROOT / "tests" / ("hookpoints" if package == "hookpoints" else "")
    rooms = dict.fromkeys((names[0], ALSO.get(names[0], names[0])))
    importing = re.compile(rf"\b{package}\.{names[0]}\b|from {package} import .*\b{names[0]}\b")
    found = (
        [test for room in rooms if len(names) > 1 for test in sorted((home / room).glob("test_*.py"))]
        or sorted({test for name in names for test in home.glob(f"test_{name}*.py")})
        or [test for test in sorted(home.rglob("test_*.py")) if importing.search(test.read_text("utf-8"))]
        or sorted(home.glob("layer/test_*.py" if package == "hookpoints" else "test_cli.py"))
    )
    own = f"test_{names[-1]}"
    found.sort(key=lambda test: not (test.stem.startswith(own) or own.startswith(test.stem)))
    return tuple(str(test.relative_to(ROOT)) for test in found)


def run_tests(root: Path, arguments: list[str], limit: float | None = None) -> tuple[bool, str]:
    """Whether pytest passes in a copy, and the end of what it says. Examples are derandomized: kills can be repeated.

    Whatever status pytest ends with, a module that cannot be imported counts as a failure, and so does a run that
    takes longer than `limit` seconds.
    """
    options = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "--hypothesis-profile=ci", *arguments]
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "COVERAGE_FILE": str(root / ".coverage")}
    with (root / "output.txt").open("w") as output:
        try:
            command = [sys.executable, "-m", "pytest", *options]
            status = subprocess.run(command, cwd=root, env=environment, stdout=output, stderr=output, timeout=limit)
            passed = status.returncode == 0
        except subprocess.TimeoutExpired:
            passed = False
    return passed, (root / "output.txt").read_text("utf-8", "replace")


@functools.cache
def unchanged(root: Path, tests: frozenset[str]) -> tuple[coverage.CoverageData, float]:
    """What tests execute in the unchanged copy, and how many seconds they take."""
    begin, options = time.monotonic(), [f"--cov={package}" for package in PACKAGES]
    passed, said = run_tests(root, [*sorted(tests), *options, "--cov-context=test", "--cov-report="])
    if not passed:
        raise SystemExit(f"without any mutant {sorted(tests)} do not pass:\n{said[-3000:]}")
    data = coverage.CoverageData(no_disk=True)
    (read := coverage.CoverageData(str(root / ".coverage"))).read()
    data.update(read)
    return data, time.monotonic() - begin


def survives(mutant: Mutant, root: Path) -> bool:
    """Whether the tests that execute the changed lines pass."""
    tests, file, begin = mirror(mutant.file), root / mutant.file, time.monotonic()
    data, seconds = unchanged(root, frozenset(tests))
    executed = data.contexts_by_lineno(str(file))
    lines = [line for line in range(mutant.first, mutant.last + 1) if line in executed]
    lines = lines or [max((line for line in executed if line < mutant.first), default=0)]
    contexts = {context for line in lines for context in executed.get(line, [""])}
    if "" in contexts:  # as the module is imported: then all that executes anything of it
        contexts = {context for found in executed.values() for context in found} - {""} or {*tests}
    # A fixture may be what a whole file shares.
    chosen = {each.partition("|" if each.endswith("|run") else "::")[0] for each in contexts}
    chosen = sorted(chosen, key=lambda test: tests.index(test.partition("::")[0]))
    source = file.read_text("utf-8")
    file.write_text(mutant.source, "utf-8")
    passed, said = run_tests(root, chosen, 60 + 3 * seconds)
    file.write_text(source, "utf-8")
    why = next((line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))), "")
    what = f"{mutant.file}:{mutant.first} {mutant.operator}: {mutant.change:.100}"
    print(f"{'SURVIVES' if passed else 'killed':8} {time.monotonic() - begin:5.0f} s  {what}  {why:.90}", flush=True)
    return passed


def main(
    sample: int = 200, seed: int = int(f"{date.today():%Y%m%d}"), only: str = "", out: Path = ROOT / "docs"
) -> None:
    """Try a sample of mutants.

    Args:
        sample: mutants to try
        seed: of the sample (default: today)
        only: files with this text in their path
        out: folder for mutants.json
    """
    files = [str(file.relative_to(ROOT)) for each in PACKAGES for file in sorted((ROOT / each).rglob("*.py"))]
    files = [file for file in files if only in file and (find_spec("fla") or "points/fla/" not in file)]
    mutants, n = draw(files, sample, seed)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        root = Path(folder).resolve() / "copy"
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".git", "__pycache__", ".*_cache"))
        left = [mutant for mutant in mutants if survives(mutant, root)]
    tried, lost = (Counter(mutant.operator for mutant in each) for each in (mutants, left))
    survivors = [{"file": x.file, "line": x.first, "operator": x.operator, "change": x.change} for x in left]
    result = {
        "date": f"{date.today()}",
        "mutmut": version("mutmut"),
        "seed": seed,
        "mutants": n,
        "sample": len(mutants),
        "operators": {name: [tried[name], lost[name]] for name in sorted(tried)},
        "survivors": survivors,
    }
    (out / "mutants.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(f"{len(mutants) - len(left)} of {len(mutants)} mutants were killed")


if __name__ == "__main__":
    tyro.cli(main)
