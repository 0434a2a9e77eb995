"""Mutation testing: of the changes of `definitions.toml`, which does no test notice, and which tests notice which?

    python tools/mutants/run.py [--only TEXT]
    python tools/mutants/run.py --killers [--only TEXT] [--seconds T] [--out FOLDER]

Each row of `definitions.toml` changes what a number means, at one place, and names a test by the formula that must fail
with it. Every row is tried in a copy of the checkout. Each run is a fork of this process, which has imported torch and
the other upstreams, and none of the packages; a row costs about a second more than its test.

``--killers`` tries each row with all tests that mirror its module and execute its lines, those of its own file first,
up to `--seconds` of them: ``hookpoints/edits/edit.py`` has the folder ``tests/hookpoints/edits``, ``writesae/push.py``
has ``tests/test_push.py``, and a module without either has the test files that import it. ``killers.json`` gets all
tests that fail with each row, and the seconds of each test. `cover` is a greedy choice of tests that kills whatever is
killed; `only` are those without which a row lives; `spare` kill nothing that no cheaper test kills; `idle` kill none.
A test that is spare or idle may still hold what no row touches. This needs the extra ``nightly``.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
import tyro

if TYPE_CHECKING:
    import coverage

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


class Mutant(NamedTuple):
    """A row of `definitions.toml`: its definition, and its change of the lines `first` to `last` of a file.

    `source` is the whole file after it, and `test` the test that must fail.
    """

    file: str
    definition: str
    first: int
    last: int
    source: str
    test: str


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
        import coverage

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
    import coverage

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


def defined(only: str = "") -> list[Mutant]:
    """The rows in files with that text in their path. `tests/test_house.py` holds that each changes one place."""
    mutants: list[Mutant] = []
    for row in tomllib.loads(DEFINITIONS.read_text("utf-8"))["mutant"]:
        if only in row["file"]:
            text, code = (ROOT / row["file"]).read_text("utf-8"), row["code"]
            first = text.partition(code)[0].count("\n") + 1
            lines = first, first + code.count("\n")
            source = text.replace(code, row["change"])
            mutants.append(Mutant(row["file"], row["definition"], *lines, source, row["test"]))
    return mutants


def survives(mutant: Mutant, root: Path, tests: dict[str, float], *options: str) -> bool:
    """Whether tests pass with the mutant."""
    begin, file = time.monotonic(), root / mutant.file
    if tests:
        with replaced(file, mutant.source):
            passed, said = forked(root, [*options, *tests], SLACK + 4 * sum(tests.values()))
    else:
        passed, said = True, "no test executes it"
    why = next((line for line in said.splitlines() if line.startswith(("FAILED", "ERROR", "no test"))), "")
    verdict, seconds = "SURVIVES" if passed else "killed", time.monotonic() - begin
    place = f"{mutant.file}:{mutant.first} {mutant.definition}"
    print(f"{verdict:8} {seconds:5.0f} s {len(tests):3}  {place}  {why:.90}", flush=True)
    return passed


def undefended(mutants: list[Mutant], root: Path) -> list[str]:
    """The definitions that no test defends: their tests pass with the change."""
    passed, said = forked(root, ["-m", "not nightly", *sorted({mutant.test for mutant in mutants})], 3600)
    if not passed:
        raise SystemExit(f"the tests of {DEFINITIONS.name} do not pass without any mutant:\n{said[-3000:]}")
    options = ("-m", "not nightly", "-x")
    return [mutant.definition for mutant in mutants if survives(mutant, root, {mutant.test: 145}, *options)]


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
            "mutants": [{"mutant": of.definition, "killers": killers} for of, killers in zip(mutants, found)],
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


def main(only: str = "", killers: bool = False, seconds: float = 60, out: Path = Path()) -> None:
    """Try the rows of definitions.toml.

    Args:
        only: rows of files with this text in their path
        killers: find all tests that kill each row
        seconds: of tests for a row, with `killers`
        out: folder for killers.json
    """
    os.environ |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TOKENIZERS_PARALLELISM": "0"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "MPLBACKEND": "Agg"}
    for name in UPSTREAM:
        importlib.import_module(name)
    mutants = defined(only)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        root = Path(folder).resolve() / "copy"
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".git", "__pycache__", ".*_cache"))
        if not killers:
            if left := undefended(mutants, root):
                raise SystemExit(f"{len(left)} definitions have no test: {'; '.join(left)}")
            return
        # Neighbors share their unchanged run, whose result is then at hand.
        mutants.sort(key=lambda mutant: (mutant.file, mutant.first))
        for found in matrix(mutants, root, seconds):
            (out / "killers.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    tyro.cli(main)
