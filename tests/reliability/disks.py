"""Kills at random moments, full disks and read-only folders, for what writes files: evaluations, collections,
dictionaries with their checkpoints."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import torch
from small_saes import planted

from hookpoints import HookedRecurrent
from reliability.interrupts import fresh
from sae_lens_writesae.dictionaries import Train
from sae_lens_writesae.evaluations import EVALUATIONS
from sae_lens_writesae.experiment.suite import evaluate_all
from sae_lens_writesae.files import taken
from sae_lens_writesae.page.report import find_results, write_report
from sae_lens_writesae.sae.collect import collect
from sae_lens_writesae.sae.runner import train, training_config

Write = Callable[[HookedRecurrent, Path], object]
KINDS = ("install", "multistep")
SMALL = {"n_atoms": 4, "firings_per_atom": 2, "min_firings": 2, "horizon": 3}


def evaluation(model: HookedRecurrent, folder: Path) -> None:
    """Evaluations of a dictionary and the page over them, resuming what is there."""
    rows = torch.randint(1, 64, (12, 40), generator=torch.Generator().manual_seed(3))
    saes, out = {"a": planted(model, rows)}, folder / "results"
    some = [EVALUATIONS[kind](**{n: v for n, v in SMALL.items() if hasattr(EVALUATIONS[kind], n)}) for kind in KINDS]
    with taken(folder, say=lambda _: None):
        results = evaluate_all(some, model, saes, rows, out, resume=True, progress=False, say=lambda _: None)
        write_report(results, out / "report.html")


def collection(model: HookedRecurrent, folder: Path) -> None:
    """Shards of writes."""
    rows = torch.randint(1, 64, (22, 32), generator=torch.Generator().manual_seed(3))
    collect(model, rows, [0, 1], None, folder / "writes", batch_size=2, shard_bytes=100_000)


def trainings(model: HookedRecurrent, folder: Path) -> None:
    """Eight dictionaries, of writes and of states, from one collection."""
    rows = torch.randint(1, 64, (64, 32), generator=torch.Generator().manual_seed(3))
    collect(model, rows, [1], [0, 1], folder / "writes", targets=("write", "state"), batch_size=8)
    sizes = {"d_sae": 16, "k": 2, "training_tokens": 2048, "train_batch_size_tokens": 64, "seeds": (0, 1)}
    many = Train(collection=folder / "writes", targets=("write", "state"), out=folder / "saes", **sizes)
    many.run(lambda line: None)


def checkpoints(model: HookedRecurrent, folder: Path) -> None:
    """Three checkpoints of a dictionary, and the dictionary."""
    rows = torch.randint(1, 64, (40, 32), generator=torch.Generator().manual_seed(3))
    sizes = {"training_tokens": 640, "train_batch_size_tokens": 64, "context_size": 32, "n_batches_in_buffer": 4}
    sizes |= {"store_batch_size_prompts": 4, "lr_warm_up_steps": 2, "n_checkpoints": 3}
    how = {"checkpoint_path": str(folder / "run"), "is_dataset_tokenized": True, "verbose": False}
    cfg = training_config(model, 1, 2, architecture="writesae_topk", d_sae=24, sae={"k": 4}, **sizes, **how)
    train(cfg, model, datasets.Dataset.from_dict({"tokens": rows.tolist()})).save_inference_model(folder / "sae")


def contents(folder: Path) -> dict[str, object]:
    """What a folder holds, without what tells of the run itself: times, and names of runs."""
    found: dict[str, object] = {}
    for result in find_results([folder / "results"]) if (folder / "results").exists() else []:
        found |= {f"{result.kind}-{name}": table.to_dict() for name, table in result.tables.items()}
        found[result.kind] = {key: value for key, value in result.info.items() if key != "seconds"}
    for file in sorted(folder.rglob("*.safetensors")):
        if "run" not in file.relative_to(folder).parts:
            found[str(file.relative_to(folder))] = file.read_bytes()
    return found


def _child(write: Write, model: HookedRecurrent, folder: Path, done: Path) -> int:
    process = os.fork()
    if process == 0:
        try:
            write(model, folder)
            done.touch()
        finally:
            os._exit(0)
    return process


class Kills(NamedTuple):
    """What kill -9 left."""

    kills: int
    broken: list[str]
    """What could not be read after a kill."""
    equal: bool
    """Whether the run that was not killed afterwards gave what a run without kills gives."""


def kill(write: Write, work: Path, kills: int, seed: int = 0) -> Kills:
    """Kill a process that writes at random moments, start it again in the same folder, and so on; then let it end.
    After each kill whatever is there under its own name must be whole."""
    model, draw, broken, n = fresh(), random.Random(seed), [], 0
    torch.set_num_threads(1)
    begin = time.perf_counter()
    write(model, work / "whole")
    lasts, folder = time.perf_counter() - begin, work / "killed"
    while n < kills:
        process = _child(write, model, folder, work / "done")
        moment = time.perf_counter() + draw.uniform(0, lasts)
        while (ended := os.waitpid(process, os.WNOHANG)) == (0, 0) and time.perf_counter() < moment:
            time.sleep(lasts / 200)
        if ended == (0, 0):
            os.kill(process, signal.SIGKILL)
            ended = os.waitpid(process, 0)
        if os.WIFSIGNALED(ended[1]):
            n += 1
            try:
                contents(folder) if any(folder.rglob("info.json")) else None
            except Exception as error:  # whatever a half-written file leads to
                broken.append(f"after kill {n}: {type(error).__name__}: {error}")
        if (work / "done").exists():  # ended before the kill: begin anew
            (work / "done").unlink()
            shutil.rmtree(folder)
    write(model, folder)
    return Kills(n, broken, contents(folder) == contents(work / "whole"))


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """A file system of so many bytes on ``folder``; False where this process may not make one."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    made = sys.platform == "linux" and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield made
    finally:
        if made:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


class Disk(NamedTuple):
    """What a full and then a read-only file system led to."""

    full: list[str]
    """Errors, one for each size of the disk."""
    read_only: str
    equal: bool
    """Whether the run after room was made gave what a run with room gives."""


def full_disk(write: Write, work: Path, sizes: Sequence[float] = (0.3, 0.6, 0.9)) -> Disk | None:
    """Write to disks that are too small by some shares of what is needed, make room, write again; then read-only.
    None where no file system can be made."""
    model = fresh()
    write(model, work / "whole")
    needed = sum(file.stat().st_size for file in (work / "whole").rglob("*") if file.is_file())
    expected, errors, read_only, equal = contents(work / "whole"), [], "", True
    for n, size in enumerate(sizes):
        folder = work / f"disk{n}"
        with small_disk(folder, max(int(size * needed), 4096)) as made:
            if not made:
                return None
            errors.append(_error(write, model, folder))
            remount(folder, f"size={10 * needed + 2**24}")
            write(model, folder)
            equal = equal and contents(folder) == expected
            if n == 0:
                remount(folder, "ro")
                read_only = _error(write, model, folder)
    return Disk(errors, read_only, equal)


def _error(write: Write, model: HookedRecurrent, folder: Path) -> str:
    """The error that writing to ``folder`` ends with; it must be one that names something in the folder."""
    try:
        write(model, folder)
    except (OSError, ValueError) as error:
        return "named" if str(folder) in str(error) else f"{type(error).__name__} without the folder: {error}"
    except Exception as error:  # of a lower library
        return f"{type(error).__name__}: {error}"
    return "none"


def two_processes(write: Write, work: Path) -> bool | None:
    """Two processes write to one folder at once: one waits, or is refused, and the result is that of one alone. None
    where both failed."""
    model = fresh()
    write(model, work / "whole")
    both = [_child(write, model, work / "shared", work / f"done{n}") for n in range(2)]
    for process in both:
        os.waitpid(process, 0)
    if not any((work / f"done{n}").exists() for n in range(2)):
        return None
    return contents(work / "shared") == contents(work / "whole")
