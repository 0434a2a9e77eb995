"""Mutation testing: does the suite notice when one line of the packages is wrong?

    python tests/mutants/run.py [--only NAME ...] [--sample N [--seed S]] [--shard I/N] [--jobs N] [--timeout SECONDS]
                                [--no-baseline]

Each entry of `mutants.toml` exchanges one piece of text in a copy of the packages, in a temporary folder, and runs the
tests that must fail then. The checkout is never touched. An entry has:

    [name]
    file = "hookpoints/rules"            a file, or a folder in whose Python files the text is looked for
    old = "..."                          must occur exactly once there
    new = "..."
    tests = ["test_rules.py"]            files or node ids; a file is found by its name anywhere under tests/
    survives = "why"                     optional: the reason for which no test can notice it

The unchanged copy must pass the named tests first. A mutant is *killed* if a test fails, or if the run takes longer
than the timeout; *survived* if all pass; *stale* if its text is not there exactly once, or a test that it names is
gone. Exit status: 0 if nothing is stale and each mutant is killed, unless it says that it survives; 1 otherwise.
"""

from __future__ import annotations

import argparse
import compileall
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("hookpoints", "sae_lens_writesae", "writesae.py", "tests", "pyproject.toml")
PRELOADED = ["torch", "pandas", "scipy.stats", "transformers", "transformer_lens", "sae_lens", "hypothesis", "pytest"]
"""Imported once: each run of the tests is forked from a process that has them, which saves most of its time."""
PLUGIN = """
from hypothesis import Phase, settings

# Any failing example will do; looking for the smallest one would take most of the time.
settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate], database=None)
settings.load_profile("mutants")
"""


class Mutant(NamedTuple):
    """One entry of mutants.toml."""

    name: str
    file: str
    old: str
    new: str
    tests: list[str]
    survives: str = ""


class Outcome(NamedTuple):
    """What became of a mutant."""

    mutant: Mutant
    verdict: str
    """killed, survived or stale."""
    why: str
    seconds: float

    @property
    def good(self) -> bool:
        """Whether it is as it should be."""
        return self.verdict == ("survived" if self.mutant.survives else "killed")


class Run(NamedTuple):
    """What pytest left."""

    status: int
    text: str


class Stale(Exception):
    """A mutant that no longer fits the code or the tests."""


def read_mutants() -> list[Mutant]:
    """All entries of mutants.toml, in its order. Unknown fields raise TypeError."""
    entries = tomllib.loads((Path(__file__).parent / "mutants.toml").read_text(encoding="utf-8"))
    return [Mutant(name, **entry) for name, entry in entries.items()]


def copy_to(folder: Path) -> Path:
    """A copy of what the tests need."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            compileall.compile_dir(folder / name, quiet=2)  # tests write no bytecode, so a mutant's is never kept
        else:
            shutil.copy2(source, folder / name)
    (folder / "no_shrinking.py").write_text(PLUGIN, encoding="utf-8")
    return folder


def place_of(mutant: Mutant, root: Path) -> Path:
    """The only file with the mutant's text."""
    where = root / mutant.file
    files = sorted(where.rglob("*.py")) if where.is_dir() else [where] if where.is_file() else []
    if not files:
        raise Stale(f"there is no {mutant.file}")
    counts = {file: file.read_text(encoding="utf-8").count(mutant.old) for file in files}
    if sum(counts.values()) != 1:
        raise Stale(f"its text occurs {sum(counts.values())} times in {mutant.file}, wanted once")
    return max(counts, key=lambda file: counts[file])


def node_ids(tests: list[str], root: Path) -> list[str]:
    """The tests as paths from `root`."""
    found = []
    for test in tests:
        name, _, node = test.partition("::")
        matches = sorted((root / "tests").rglob(name))
        if len(matches) != 1:
            raise Stale(f"{len(matches)} test files are called {name}, wanted one")
        if node and f"def {node.split('::')[-1].partition('[')[0]}(" not in matches[0].read_text(encoding="utf-8"):
            raise Stale(f"{name} has no test {node}")
        found.append(str(matches[0].relative_to(root)) + (f"::{node}" if node else ""))
    return found


def pytest(root: Path, tests: list[str], timeout: float) -> Run:
    """Run tests in a copy. Raises TimeoutError."""
    options = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-p", "no_shrinking"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of plugins that are imported beforehand
    output = root / "output.txt"
    output.unlink(missing_ok=True)
    child = multiprocessing.get_context("forkserver").Process(target=_run_here, args=(root, [*options, *tests], output))
    child.start()
    child.join(timeout)
    if child.exitcode is None:
        child.kill()
        child.join()
        raise TimeoutError
    return Run(child.exitcode, output.read_text(encoding="utf-8", errors="replace") if output.exists() else "")


def _run_here(root: Path, arguments: list[str], output: Path) -> None:
    """In the forked process: pytest in the copy, all that is printed into a file."""
    os.chdir(root)
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    multiprocessing.set_start_method("fork", force=True)  # the default of a process of its own
    sys.path.insert(0, str(root))
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    loaded = [name for name in COPIED if name in sys.modules]
    assert not loaded, f"a module of {PRELOADED} has already imported {loaded}, so that the copy would not be tested"
    from pytest import main as run_tests

    status = int(run_tests(arguments))
    sys.stdout.flush()
    os._exit(status)


def try_mutant(mutant: Mutant, root: Path, timeout: float) -> Outcome:
    """Put the mutant into the copy at `root`, run its tests, and take it out again."""
    begin = time.perf_counter()

    def outcome(verdict: str, why: str = "") -> Outcome:
        return Outcome(mutant, verdict, why, time.perf_counter() - begin)

    try:
        file, tests = place_of(mutant, root), node_ids(mutant.tests, root)
    except Stale as reason:
        return outcome("stale", str(reason))
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        run = pytest(root, tests, timeout)
    except TimeoutError:
        return outcome("killed", f"no result after {timeout:.0f} s")
    finally:
        file.write_text(text, encoding="utf-8")
    lines = run.text.strip().splitlines()
    last = lines[-1] if lines else ""
    if run.status == 0:
        return outcome("survived", last)
    failed = next((line for line in lines if line.startswith(("FAILED", "ERROR"))), last)
    # 1: a test failed; 2: a test file could not be imported. All else says nothing of the mutant.
    return outcome("killed" if run.status in (1, 2) else "stale", failed)


def check_baseline(mutants: list[Mutant], root: Path, timeout: float) -> None:
    """Exit unless the unchanged copy passes all named tests."""
    names: set[str] = set()
    for mutant in mutants:
        try:
            names |= set(node_ids(mutant.tests, root))
        except Stale:
            continue  # reported with the mutant
    whole = {name for name in names if "::" not in name}
    tests = sorted(name for name in names if name in whole or name.partition("::")[0] not in whole)
    if not tests:
        return
    run = pytest(root, tests, timeout * max(1, len(mutants)))
    if run.status:
        raise SystemExit(f"without any mutant the named tests do not pass:\n{run.text[-3000:]}")
    print(f"unchanged: {run.text.strip().splitlines()[-1]}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of mutants, or beginnings of names")
    parser.add_argument("--sample", type=int, metavar="N", help="so many of them, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="every N-th of them, from the I-th on (from 1)")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at once, each in a copy of its own")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for the tests of one mutant")
    parser.add_argument("--no-baseline", action="store_true", help="do not run the tests on the unchanged code first")
    arguments = parser.parse_args()
    mutants = [m for m in read_mutants() if not arguments.only or m.name.startswith(tuple(arguments.only))]
    if not mutants:
        raise SystemExit(f"no mutant is called {', '.join(arguments.only)}")
    if arguments.sample is not None:
        mutants = random.Random(arguments.seed).sample(mutants, min(arguments.sample, len(mutants)))
    shard, _, shards = arguments.shard.partition("/")
    if not (shard.isdigit() and shards.isdigit() and 1 <= int(shard) <= int(shards)):
        raise SystemExit(f"--shard takes I/N with 1 <= I <= N, found {arguments.shard!r}")
    mutants = mutants[int(shard) - 1 :: int(shards)]
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies: SimpleQueue[Path] = SimpleQueue()
        for n in range(max(1, min(arguments.jobs, len(mutants)))):
            copies.put(copy_to(Path(folder) / str(n)))
        if not arguments.no_baseline:
            root = copies.get()
            check_baseline(mutants, root, arguments.timeout)
            copies.put(root)

        def work(mutant: Mutant) -> Outcome:
            root = copies.get()
            try:
                result = try_mutant(mutant, root, arguments.timeout)
            finally:
                copies.put(root)
            mark = "" if result.good else "  <--"
            print(f"{result.verdict:9} {mutant.name:44} {result.seconds:5.1f} s  {result.why[:110]}{mark}", flush=True)
            return result

        with ThreadPoolExecutor(max(1, arguments.jobs)) as pool:
            outcomes = list(pool.map(work, mutants))
    print()
    for result in outcomes:
        if result.verdict == "survived":
            print(f"survived: {result.mutant.name}: {result.mutant.survives or 'NO TEST NOTICES IT'}")
        elif result.verdict == "stale":
            print(f"stale: {result.mutant.name}: {result.why}")
        elif result.mutant.survives:
            print(f"killed though it is said to survive: {result.mutant.name}")
    print(f"{sum(r.verdict == 'killed' for r in outcomes)} of {len(outcomes)} killed")
    return 0 if all(result.good for result in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
