"""Mutation testing: of the changes that mutmut makes to one place of the packages, how many does no test notice?

    python tools/mutants/run.py [--sample N] [--seed S] [--only TEXT] [--again FILE] [--seconds T] [--out FOLDER]
    python tools/mutants/run.py --definitions
    python tools/mutants/run.py --killers [--sample N] [--seed S] [--only TEXT] [--seconds T] [--out FOLDER]

It lists every mutant of the three packages and draws a seeded sample: places first, then one mutant of each, for a call
has two mutants for each of its arguments, and most of them fail at once. Each is tried in a copy of the checkout, with
the tests that mirror its module: ``hookpoints/edits/edit.py`` has the folder ``tests/hookpoints/edits``,
``writesae/push.py`` has ``tests/test_push.py``, and a module without either has the test files that import it.
These run once unchanged, which shows the tests that execute each line; a mutant gets those alone (of a line that runs
as its module is imported, those that execute anything of the module), those of its own file first, then the quick ones,
up to `--seconds` of them. It is *killed* if one of them fails, or if they take four times as long as they did. Seconds
are those of the processor, so that a busy machine tries the same tests.

Every run is a fork of this process, which has imported torch and the other upstreams, and none of the packages. A
mutant then costs about a second more than its tests.

``mutants.json`` gets the rates and the survivors. A survivor is named by its file, its function and its diff, so that
it is found again after lines have moved: ``--again docs/mutants.json`` tries the survivors of an earlier run, of which
it keeps the sample and those that survive again. One that changes nothing which a user sees may have the entry
``equivalent``, a line that says why. It counts as a survivor, and is not tried again. Needs the extra ``nightly``,
which is apart from ``test`` because mutmut brings a terminal interface.

``--definitions`` tries the mutants of ``definitions.toml`` instead: each changes what a number means, where a test by
the formula must fail, and not only a stored result. None of them may survive.

``--killers`` tries both, the mutants of ``definitions.toml`` and the sample, and does not stop at the first test that
fails. ``killers.json`` gets all tests that fail with each mutant, and the seconds of each test. `cover` is a greedy
choice of tests that kills whatever is killed; `only` are those without which a mutant lives; `spare` kill nothing that
no cheaper test kills; `idle` kill nothing. A test that is spare or idle may still hold what no mutant of a run touches.

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

import difflib
import functools
import importlib
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

import coverage
import libcst as cst
import libcst.matchers as m
import pytest
import tyro
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators, operator_string

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("hookpoints", "sae_lens_writesae", "writesae")
DEFINITIONS = Path(__file__).with_name("definitions.toml")
UPSTREAM = ("hypothesis", "torch", "transformers", "transformer_lens", "sae_lens", "datasets", "pandas", "pyarrow")
UPSTREAM += ("scipy.stats", "sklearn.cluster", "matplotlib.pyplot", "jinja2", "pydantic", "peft", "huggingface_hub")
"""What tests import besides the packages: loaded once, before the forks."""
SLACK = 20.0
"""Seconds of a run beyond those of its tests: imports, collection."""
BUSY = 20
"""Times as many seconds as those of the processor a run may take on the clock."""
ALSO = {"layer": "hooks"}
"""Rooms whose tests are those of another one, too: hooks fire in layers."""
LEFT_OUT = (cst.Annotation, cst.Decorator, cst.Import, cst.ImportFrom, cst.Raise)
CALLS_LEFT_OUT = m.Call(
    func=m.OneOf(*map(m.Name, ("cast", "TypeVar", "len", "isinstance"))) | m.Attribute(attr=m.Name("warn"))
)
MANY = m.Integer(value=m.MatchIfTrue(lambda digits: int(digits, 0) >= 100))
TYPING = m.If(test=m.Name("TYPE_CHECKING"))


class Mutant(NamedTuple):
    """A change of a function (of a module's own statements: "") at the lines `first` to `last` of today's file.

    `source` is the whole file after it.
    """

    file: str
    function: str
    diff: tuple[str, ...]
    operator: str
    first: int
    last: int
    source: str

    @property
    def name(self) -> tuple[str, str, tuple[str, ...]]:
        """What names it in any version of its file."""
        return self.file, self.function, self.diff


class Place(NamedTuple):
    """A node of a file, the function that it stands in, and its mutants with the names of their operators."""

    node: cst.CSTNode
    function: str
    mutants: list[tuple[str, cst.CSTNode]]


class Places(cst.CSTVisitor):
    """The places of a file that have mutants."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file, self.text = file, (ROOT / file).read_text("utf-8")
        self.found: list[Place] = []
        self.scopes: list[str] = []
        self.tree = MetadataWrapper(cst.parse_module(self.text))
        self.tree.module.visit(self)

    @functools.cached_property
    def positions(self):
        return self.tree.resolve(PositionProvider)

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self.scopes.append(node.name.value)
        if isinstance(node, LEFT_OUT) or m.matches(node, CALLS_LEFT_OUT | TYPING | MANY):
            return False
        operators = [use for kind, use in mutation_operators if isinstance(node, kind) and use is not operator_string]
        mutants = [(use.__name__.removeprefix("operator_"), mutated) for use in operators for mutated in use(node)]
        if mutants:
            self.found.append(Place(node, ".".join(self.scopes), mutants))
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        if isinstance(original_node, cst.FunctionDef | cst.ClassDef):
            self.scopes.pop()

    def mutant(self, place: int, which: int) -> Mutant:
        node, function, mutants = self.found[place]
        operator, mutated = mutants[which]
        changed = self.tree.module.deep_replace(node, mutated)
        assert isinstance(changed, cst.Module)
        lines = self.positions[node]
        return Mutant(
            self.file, function, diff(self.text, changed.code), operator, lines.start.line, lines.end.line, changed.code
        )

    def mutants(self, function: str) -> Iterator[Mutant]:
        """All mutants of one function."""
        for i, place in enumerate(self.found):
            if place.function == function:
                yield from (self.mutant(i, which) for which in range(len(place.mutants)))


def diff(before: str, after: str) -> tuple[str, ...]:
    """The lines that differ, without their common indent."""
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm=""))[2:]
    lines = [line for line in lines if not line.startswith("@@")]
    texts = dedent("\n".join(line[1:] for line in lines)).split("\n")
    return tuple(f"{line[0]} {text}" for line, text in zip(lines, texts))


def draw(files: list[str], n: int, seed: int) -> tuple[list[Mutant], int]:
    """A sample of mutants, and the number of all of them."""
    counts = {file: [len(place.mutants) for place in Places(file).found] for file in files}
    places, chance = [(file, i) for file in files for i in range(len(counts[file]))], random.Random(seed)
    drawn = [(file, i, chance.randrange(counts[file][i])) for file, i in chance.sample(places, min(n, len(places)))]
    return [Places(file).mutant(i, which) for file, i, which in drawn], sum(map(sum, counts.values()))


def name_of(row: dict) -> tuple[str, str, tuple[str, ...]]:
    """The name of a survivor in mutants.json."""
    return row["file"], row["function"], tuple(row["diff"])


def listed(rows: list[dict]) -> list[Mutant]:
    """The mutants of an earlier run that their files still have."""
    mutants = []
    for row in rows:
        name = name_of(row)
        places = Places(row["file"]).mutants(row["function"]) if (ROOT / row["file"]).is_file() else ()
        same = next((mutant for mutant in places if mutant.name == name), None)
        mutants += [same] if same else []
        if not same:
            print(f"gone     {row['file']} {row['function']}: {' '.join(row['diff'])}")
    return mutants


def mirror(file: str) -> tuple[str, ...]:
    """The test files of a module, those with its name first."""
    package, *names = Path(file).with_suffix("").parts
    home = ROOT / "tests" / ("hookpoints" if package == "hookpoints" else "")
    homes = dict.fromkeys((home, ROOT / "tests"))
    rooms = dict.fromkeys((names[0], ALSO.get(names[0], names[0])))
    importing = re.compile(rf"\b{package}\.{names[0]}\b|from {package} import .*\b{names[0]}\b")
    found = (
        [test for room in rooms if len(names) > 1 for test in sorted((home / room).glob("test_*.py"))]
        or sorted({test for name in names for folder in homes for test in folder.glob(f"test_{name}*.py")})
        or [test for test in sorted(home.rglob("test_*.py")) if importing.search(test.read_text("utf-8"))]
        or sorted(home.glob("layer/test_*.py" if package == "hookpoints" else "test_cli.py"))
    )
    own = f"test_{names[-1]}"
    found.sort(key=lambda test: not (test.stem.startswith(own) or own.startswith(test.stem)))
    return tuple(str(test.relative_to(ROOT)) for test in found)


def processor_seconds() -> float:
    """Of this process and of those that it waited for."""
    return sum(os.times()[:4])


class Watch:
    """What each test executes of the packages and how many seconds it takes, of the tests that pass."""

    def __init__(self, root: Path) -> None:
        files = [str(root / package / "*") for package in PACKAGES]
        self.coverage = coverage.Coverage(data_file=root / ".coverage", include=files, config_file=False)
        self.seconds: dict[str, float] = {}
        self.context = ""

    def switch(self, context: str) -> str:
        before, self.context = self.context, context
        self.coverage.switch_context(context)
        return before

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.switch(item.nodeid)
        begin = processor_seconds()
        result = yield
        self.seconds[item.nodeid] = round(processor_seconds() - begin, 3)
        self.switch("")
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        """What several tests share counts for all tests of the file that sets it up."""
        shared = fixturedef.scope != "function"
        before = self.switch(self.context.partition("::")[0] if shared else self.context)
        try:
            return (yield)
        finally:
            self.switch(before)


class Failures:
    """Notes each test that fails, and each file that cannot be collected, at once: a run that is stopped has them."""

    def __init__(self, root: Path) -> None:
        self.file = root / "failed.txt"
        self.file.write_text("")

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            with self.file.open("a") as file:
                file.write(f"{report.nodeid}\n")

    pytest_collectreport = pytest_runtest_logreport


def failed_among(tests: Iterable[str], root: Path) -> list[str]:
    """Those of the tests that failed in the last run; of a file that cannot be collected, all."""
    failed = {*(root / "failed.txt").read_text().splitlines()}
    return [test for test in tests if {test, test.partition("::")[0]} & failed]


def forked(root: Path, arguments: list[str], limit: float, watch: Watch | None = None) -> tuple[bool, str]:
    """Whether pytest passes in a copy, and what it says. Examples are derandomized: kills can be repeated.

    Whatever status pytest ends with, a module that cannot be imported counts as a failure, and so does a run that
    takes longer than `limit` seconds of the processor.
    """
    # One process, whose coverage is seen: xdist is not loaded, and knows its options no more.
    options = [
        "-o",
        "addopts=",
        "-m",
        "not slow and not nightly",
        "-q",
        "--tb=line",
        "-p",
        "no:cacheprovider",
        "-p",
        "_hypothesis_pytestplugin",
    ]
    options += ["--hypothesis-profile=ci", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    said, failures = root / "output.txt", Failures(root)
    sys.stdout.flush()
    if not (child := os.fork()):
        status = 1
        try:
            os.setpgid(0, 0)
            resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit), math.ceil(limit) + 1))
            output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.chdir(root)
            sys.path.insert(0, str(root))
            sys.argv = ["pytest"]
            os.environ["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
            if watch:
                watch.coverage.start()
            else:  # the compiled forms of the unchanged run stay
                sys.dont_write_bytecode = True
                os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
            status = int(pytest.main([*options, *arguments], plugins=[failures, *([watch] if watch else [])]))
            if watch:
                watch.coverage.stop()
                watch.coverage.save()
                (root / "seconds.json").write_text(json.dumps(watch.seconds))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    begin, done = time.monotonic(), (0, 0)
    while not done[0] and time.monotonic() - begin < BUSY * limit:
        time.sleep(0.02)
        done = os.waitpid(child, os.WNOHANG)
    if not done[0]:
        os.killpg(child, signal.SIGKILL)
        done = os.waitpid(child, 0)
    return done[1] == 0, said.read_text("utf-8", "replace") if said.is_file() else ""


@functools.cache
def unchanged(root: Path, tests: tuple[str, ...]) -> tuple[coverage.CoverageData, dict[str, float]]:
    """What tests execute in the unchanged copy, and how many seconds each takes. Those that fail are left out."""
    print(f"         unchanged: {len(tests)} test files, {tests[0]} ...", flush=True)
    for name in (".coverage", "seconds.json"):
        (root / name).unlink(missing_ok=True)
    _, said = forked(root, [*tests], 3600, Watch(root))
    if not (root / "seconds.json").is_file():
        raise SystemExit(f"the tests {tests} do not run without any mutant:\n{said[-3000:]}")
    seconds: dict[str, float] = json.loads((root / "seconds.json").read_text())
    failed = failed_among(seconds, root)
    if not seconds:
        raise SystemExit(f"none of the tests {tests} runs without any mutant:\n{said[-3000:]}")
    for test in failed:
        print(f"         fails without any mutant, and is left out: {test}", flush=True)
    data = coverage.CoverageData(no_disk=True)
    (read := coverage.CoverageData(str(root / ".coverage"))).read()
    data.update(read)
    return data, {test: cost for test, cost in seconds.items() if test not in failed}


def choose(mutant: Mutant, root: Path, budget: float) -> dict[str, float]:
    """The tests that execute the changed lines with the seconds that they take, up to `budget` of them."""
    tests = mirror(mutant.file)
    data, seconds = unchanged(root, tuple(sorted(tests)))
    executed = data.contexts_by_lineno(str(root / mutant.file))
    lines = [line for line in range(mutant.first, mutant.last + 1) if line in executed]
    lines = lines or [max((line for line in executed if line < mutant.first), default=0)]
    contexts = {context for line in lines for context in executed.get(line, [""])}
    if "" in contexts:  # as the module is imported: then all that executes anything of it
        contexts = {context for found in executed.values() for context in found} - {""} or {*tests}
    reached = [test for test in seconds if test in contexts or test.partition("::")[0] in contexts]
    first = tests[0]
    reached.sort(key=lambda test: (not test.startswith(first), seconds[test]))
    chosen: dict[str, float] = {}
    for test in reached:
        if not chosen or sum(chosen.values()) + seconds[test] <= budget:
            chosen[test] = seconds[test]
    return chosen


@contextmanager
def replaced(file: Path, source: str) -> Iterator[None]:
    """A scope in which a file has another text. Afterwards its compiled form is still valid."""
    before, times = file.read_text("utf-8"), file.stat()
    file.write_text(source, "utf-8")
    try:
        yield
    finally:
        file.write_text(before, "utf-8")
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def defined(only: str = "") -> dict[Mutant, str]:
    """The mutants of `definitions.toml` in files with that text in their path, named by their definitions, and their
    tests. `tests/test_house.py` holds that each changes one place."""
    found = {}
    for row in tomllib.loads(DEFINITIONS.read_text("utf-8"))["mutant"]:
        if only in row["file"]:
            text, code = (ROOT / row["file"]).read_text("utf-8"), row["code"]
            source = text.replace(code, row["change"])
            first = text.partition(code)[0].count("\n") + 1
            lines = first, first + code.count("\n")
            mutant = Mutant(row["file"], row["definition"], diff(text, source), "definition", *lines, source)
            found[mutant] = row["test"]
    return found


def survives(mutant: Mutant, root: Path, tests: dict[str, float], *options: str) -> bool:
    """Whether tests pass with the mutant."""
    begin, file = time.monotonic(), root / mutant.file
    if tests:
        with replaced(file, mutant.source):
            passed, said = forked(root, [*options, *tests], SLACK + 4 * sum(tests.values()))
    else:
        passed, said = True, "no test executes it"
    why = next((line for line in said.splitlines() if line.startswith(("FAILED", "ERROR", "no test"))), "")
    where = f"{mutant.file}:{mutant.first} {mutant.function} {mutant.operator}"
    print(
        f"{'SURVIVES' if passed else 'killed':8} {time.monotonic() - begin:5.0f} s {len(tests):3}  {where}  {why:.90}"
    )
    print("\n".join(f"             {line}" for line in mutant.diff), flush=True)
    return passed


def undefended(root: Path) -> list[str]:
    """What `definitions.toml` defines and no test defends: its test passes with the mutant."""
    mutants = defined()
    passed, said = forked(root, ["-m", "not nightly", *sorted({*mutants.values()})], 3600)
    if not passed:
        raise SystemExit(f"the tests of {DEFINITIONS.name} do not pass without any mutant:\n{said[-3000:]}")
    options = ("-m", "not nightly", "-x")
    return [mutant.function for mutant, test in mutants.items() if survives(mutant, root, {test: 145}, *options)]


def matrix(mutants: list[Mutant], root: Path, budget: float) -> Iterator[dict[str, object]]:
    """After each mutant: all killers of those so far, and what they say about tests."""
    found: list[list[str]] = []
    seconds: dict[str, float] = {}
    for mutant in mutants:
        tests = choose(mutant, root, budget)
        seconds |= tests
        found.append([] if survives(mutant, root, tests) else failed_among(tests, root) or ["time"])
        cheap_first = sorted(seconds, key=lambda test: seconds[test])
        killed = {test: {n for n, killers in enumerate(found) if test in killers} for test in cheap_first}
        first = [next((test for test in killed if test in killers), "") for killers in found]
        yield {
            "mutants": [{"mutant": of.name, "killers": killers} for of, killers in zip(mutants, found)],
            "tests": seconds,
            "cover": cover(killed),
            "only": [test for test in killed if [test] in found],
            "spare": [test for test, own in killed.items() if own and test not in first],
            "idle": [test for test, own in killed.items() if not own],
        }


def cover(killed: dict[str, set[int]]) -> list[str]:
    """Tests that kill all that is killed: always the one that kills the most that is left, the first of equals."""
    left, taken = set[int]().union(*killed.values()), []
    while left:
        taken.append(max(killed, key=lambda test: len(killed[test] & left)))
        left -= killed[taken[-1]]
    return taken


def main(
    sample: int = 200,
    seed: int = int(f"{date.today():%Y%m%d}"),
    only: str = "",
    again: Path | None = None,
    seconds: float = 60,
    definitions: bool = False,
    killers: bool = False,
    out: Path = ROOT / "docs",
) -> None:
    """Try a sample of mutants.

    Args:
        sample: mutants to try
        seed: of the sample (default: today)
        only: files with this text in their path
        again: try the survivors that this file names, and no sample; the rates of its sample follow
        seconds: of tests for a mutant
        definitions: try the mutants of definitions.toml, and no sample
        killers: find all tests that kill each mutant, of definitions.toml and of the sample
        out: folder for mutants.json, or killers.json
    """
    files = [str(file.relative_to(ROOT)) for name in PACKAGES for file in sorted((ROOT / name).rglob("*.py"))]
    files = [file for file in files if only in file and (find_spec("fla") or "points/fla/" not in file)]
    mutants, n = draw([] if definitions else files, 0 if again else sample, seed)
    earlier = json.loads(again.read_text("utf-8")) if again else {}
    if again:
        mutants = listed([row for row in earlier["survivors"] if "equivalent" not in row])
    # Neighbors share their unchanged run, whose result is then at hand.
    mutants.sort(key=lambda mutant: (mutant.file, mutant.first))
    os.environ |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TOKENIZERS_PARALLELISM": "0"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "MPLBACKEND": "Agg"}
    for name in UPSTREAM:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        root = Path(folder).resolve() / "copy"
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".git", "__pycache__", ".*_cache"))
        if definitions:
            if left := undefended(root):
                raise SystemExit(f"{len(left)} definitions have no test: {'; '.join(left)}")
            return
        if killers:
            for found in matrix([*defined(only), *mutants], root, seconds):
                (out / "killers.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
            return
        left = [mutant for mutant in mutants if survives(mutant, root, choose(mutant, root, seconds), "-x")]
    result = {
        "date": f"{date.today()}",
        "mutmut": version("mutmut"),
        "seed": seed,
        "mutants": n,
        "sample": len(mutants),
        "packages": counts(mutants, left, lambda mutant: mutant.file.partition("/")[0]),
        "operators": counts(mutants, left, lambda mutant: mutant.operator),
        "survivors": [{"file": x.file, "function": x.function, "operator": x.operator, "diff": x.diff} for x in left],
    }
    if again:
        result = without(earlier, {mutant.name for mutant in mutants} - {mutant.name for mutant in left})
    (out / "mutants.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(f"{len(mutants) - len(left)} of {len(mutants)} mutants were killed")


def without(earlier: dict, killed: set[tuple[str, str, tuple[str, ...]]]) -> dict:
    """An earlier run without the survivors that are killed since."""
    left = [row for row in earlier["survivors"] if name_of(row) not in killed]
    of_folder = {folder: name for name in earlier["packages"] for folder in name.split(" and ")}
    lost = Counter(of_folder[row["file"].partition("/")[0]] for row in left) + Counter(row["operator"] for row in left)
    rates = {
        kind: {name: [tried, lost[name]] for name, (tried, _) in earlier[kind].items()}
        for kind in ("packages", "operators")
    }
    return earlier | rates | {"survivors": left}


def counts(mutants: list[Mutant], left: list[Mutant], kind: Callable[[Mutant], str]) -> dict[str, list[int]]:
    """Of each kind: how many were tried, and how many survive."""
    tried, lost = Counter(map(kind, mutants)), Counter(map(kind, left))
    return {name: [tried[name], lost[name]] for name in sorted(tried)}


if __name__ == "__main__":
    tyro.cli(main)
