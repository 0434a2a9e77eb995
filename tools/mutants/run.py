"""Mutation testing: which changes of `definitions.toml` does no test notice?

    python tools/mutants/run.py [--only TEXT]

Each row of `definitions.toml` changes what a number means, at one place, and names a test by the formula that must fail
with it. Every row is tried in a copy of the checkout. Each run is a fork of this process, which has imported torch and
the other upstreams, and none of the packages; a row costs about a second more than its test.
"""

from __future__ import annotations

import importlib
import math
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import tyro

ROOT = Path(__file__).resolve().parents[2]
DEFINITIONS = Path(__file__).with_name("definitions.toml")
UPSTREAM = ("hypothesis", "torch", "transformers", "transformer_lens", "sae_lens", "datasets", "pandas", "pyarrow")
UPSTREAM += ("scipy.stats", "sklearn.cluster", "matplotlib.pyplot", "jinja2", "pydantic", "peft", "huggingface_hub")
"""What tests import besides the packages: loaded once, before the forks."""
LIMIT = 600
"""Seconds of the processor that the test of a row may take."""
BUSY = 20
"""Times as many seconds as those of the processor a run may take on the clock."""
OPTIONS = ("-m", "not nightly", "-q", "--tb=line", "-p", "no:cacheprovider", "-p", "_hypothesis_pytestplugin")
OPTIONS += ("--hypothesis-profile=ci", "-W", "ignore::pytest.PytestAssertRewriteWarning")
"""Of pytest, in one process. Examples are derandomized: kills can be repeated."""


class Mutant(NamedTuple):
    """A row of `definitions.toml`: its definition, a line of a file, and the whole file after the change."""

    file: str
    definition: str
    line: int
    source: str
    test: str
    """Which must fail."""


def passes(root: Path, arguments: list[str], limit: float) -> tuple[bool, str]:
    """Whether pytest passes in a copy, and what it says.

    Whatever status pytest ends with, a module that cannot be imported counts as a failure, and so does a run that
    takes longer than `limit` seconds of the processor.
    """
    printed = root / "output.txt"
    sys.stdout.flush()
    if not (child := os.fork()):
        status = 1
        try:
            os.setpgid(0, 0)
            resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit), math.ceil(limit) + 1))
            output = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.chdir(root)
            sys.path.insert(0, str(root))
            sys.argv = ["pytest"]
            os.environ["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
            # The compiled forms of the unchanged run stay.
            sys.dont_write_bytecode = True
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
            status = int(pytest.main(["-o", "addopts=", *OPTIONS, *arguments]))
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
    return done[1] == 0, printed.read_text("utf-8", "replace") if printed.is_file() else ""


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
            text = (ROOT / row["file"]).read_text("utf-8")
            line = text.partition(row["code"])[0].count("\n") + 1
            source = text.replace(row["code"], row["change"])
            mutants.append(Mutant(row["file"], row["definition"], line, source, row["test"]))
    return mutants


def survives(mutant: Mutant, root: Path) -> bool:
    """Whether its test passes with the mutant."""
    begin = time.monotonic()
    with replaced(root / mutant.file, mutant.source):
        passed, said = passes(root, ["-x", mutant.test], LIMIT)
    why = next((line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))), "")
    verdict = "SURVIVES" if passed else "killed"
    seconds = time.monotonic() - begin
    print(f"{verdict:8} {seconds:5.0f} s  {mutant.file}:{mutant.line} {mutant.definition}  {why:.90}", flush=True)
    return passed


def main(only: str = "") -> None:
    """Try the rows of definitions.toml.

    Args:
        only: rows of files with this text in their path
    """
    os.environ |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TOKENIZERS_PARALLELISM": "0"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "MPLBACKEND": "Agg"}
    for name in UPSTREAM:
        importlib.import_module(name)
    mutants = defined(only)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        root = Path(folder).resolve() / "copy"
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".git", "__pycache__", ".*_cache"))
        passed, said = passes(root, sorted({mutant.test for mutant in mutants}), 3600)
        if not passed:
            raise SystemExit(f"the tests of {DEFINITIONS.name} do not pass without any mutant:\n{said[-3000:]}")
        if survivors := [mutant.definition for mutant in mutants if survives(mutant, root)]:
            raise SystemExit(f"{len(survivors)} definitions have no test: {'; '.join(survivors)}")


if __name__ == "__main__":
    tyro.cli(main)
