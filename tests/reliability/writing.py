"""Kills while collections and dictionaries are written."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from threading import RLock
from typing import Any
from unittest.mock import patch

from remembering import drawn_ids
from tqdm.auto import tqdm

import writesae
from hookpoints import HookedRecurrent
from hookpoints.files import CHECKSUMS
from reliability.checks import Comparison, check
from reliability.folders import read_dictionary
from reliability.runs import fresh
from sae_lens_writesae.sae import rows as sae_rows
from sae_lens_writesae.sae.collecting import collect
from sae_lens_writesae.sae.factors import INDEX
from writesae.flags import Train
from writesae.training import run_train

PRODUCT = Path(writesae.__file__).parents[1]


def dictionaries(model: HookedRecurrent, folder: Path) -> None:
    """A collection in several shards, and dictionaries of writes and of states from it, with a checkpoint after each
    step, or after each twentieth."""
    rows = drawn_ids(64, 32, seed=3)
    collected = folder / "writes"
    collect(model, rows, [1], [0, 1], collected, targets=("write", "state"), batch_size=8, shard_bytes=100_000)
    sizes: dict[str, Any] = {"d_sae": 16, "k": 2, "training_tokens": 1024, "train_batch_size_tokens": 64}
    with patch.object(sae_rows, "SAVE_SECONDS", -1.0):
        flags = Train(collection=collected, out=folder / "saes", targets=("write", "state"), **sizes)
        run_train(flags, lambda line: None)


def contents(folder: Path) -> dict[str, object]:
    """What is there under its own name, read."""
    there: dict[str, object] = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if any(part.startswith(".") or part == "checkpoint" for part in Path(name).parts):  # of what is not finished
            continue
        if file.name == "cfg.json":
            there[name] = read_dictionary(file.parent)
        elif file.name.startswith("shard-") or file.name == INDEX:
            there[name] = file.read_bytes()
        elif file.name == CHECKSUMS and (file.parent / INDEX).exists():
            there |= {f"{name}, {line}": True for line in file.read_text().splitlines()}
    return there


class _Killer:
    """Counts calls of built-in functions that change files, and kills the process as one of them returns. `places` has
    the numbers of the calls by the lines of the product that led to them: some lines write hundreds of times."""

    CALLS = ("open", "write", "replace", "rename", "mkdir", "unlink", "chmod", "serialize_file")

    def __init__(self, at: int | None = None):
        self.at, self.calls = at, 0
        self.places: dict[tuple[object, ...], list[int]] = {}

    def __call__(self, frame, event, arg) -> None:
        if event != "c_return" or arg.__name__ not in self.CALLS or isinstance(getattr(arg, "__self__", None), str):
            return
        if "/json/" not in frame.f_code.co_filename:  # which writes a file in hundreds of calls
            self.calls += 1
            if self.calls == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.at is None:
                stack = ((each.f_code, each.f_lineno) for each, _ in traceback.walk_stack(frame))
                lines = ((code.co_name, line) for code, line in stack if str(PRODUCT) in code.co_filename)
                self.places.setdefault((arg.__name__, *lines), []).append(self.calls)

    def draw(self, n: int) -> list[int]:
        """Numbers of calls, of as many places as there can be."""
        draw = random.Random(0)
        places = list(self.places.values())
        return [draw.choice(calls) for calls in draw.sample(places, min(n, len(places)))]

    def run(self, model: HookedRecurrent, folder: Path) -> None:
        sys.setprofile(self)
        try:
            dictionaries(model, folder)
        finally:
            sys.setprofile(None)


@check(few=2, many=60, slow=True)
def kills_dictionaries(work: Path, rounds: int) -> Iterator[Comparison]:
    """The process is killed (SIGKILL) as a call that changes files returns, at another line each time. What it left is
    read and compared with the same of a run without kills. Then the run is resumed, and the whole is compared."""
    model, counter = fresh(), _Killer()
    counter.run(model, work / "whole")
    expected = contents(work / "whole")
    for at in counter.draw(rounds):
        folder = work / f"killed-{at}"
        if (process := os.fork()) == 0:
            try:
                tqdm.get_lock().locks = [RLock()]  # forks share the lock of bars, and a kill would leave it taken
                _Killer(at).run(model, folder)
            finally:
                os._exit(0)
        os.waitpid(process, 0)
        for name, left in contents(folder).items():
            yield Comparison(f"{name} after a kill at call {at}", expected[name], left)
        dictionaries(model, folder)
        yield Comparison(f"finished after a kill at call {at}", expected, contents(folder))
        shutil.rmtree(folder)
