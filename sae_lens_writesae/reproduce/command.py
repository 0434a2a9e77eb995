"""`writesae reproduce`: the paper's whole table for a model; several processes and machines may share its folder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from filelock import FileLock, Timeout

from sae_lens_writesae.cli import parse
from sae_lens_writesae.page.report import ReportFiles
from sae_lens_writesae.reproduce.config import SMALL, ReproduceConfig
from sae_lens_writesae.reproduce.estimate import estimate
from sae_lens_writesae.reproduce.tasks import Task, is_done, make_tasks
from sae_lens_writesae.reproduce.workspace import Workspace

Say = Callable[[str], object]

_WAIT = 2.0
"""Seconds between looks at what other processes have finished."""


@dataclass(frozen=True)
class Place:
    """Where this process stands among those that `torchrun` or `accelerate launch` started."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Place:
        """RANK, WORLD_SIZE, LOCAL_RANK, as both launchers set them; one process without them."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        rank, world, local = (int(os.environ.get(name, default)) for name, default in zip(names, ("0", "1", "0")))
        return cls(rank, world, local)

    @property
    def device(self) -> str | None:
        """The GPU of this process, None where there is none."""
        return f"cuda:{self.local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else None


def run_tasks(
    config: ReproduceConfig,
    folder: Path,
    *,
    place: Place | None = None,
    workspace: Workspace | None = None,
    say: Say = print,
) -> list[str]:
    """Do every step that is not done, and wait for those that other processes are doing.

    A step is taken by a lock on a file, which the operating system lets go when a process dies, so a killed process
    blocks nobody. Each process begins at another head, so that they rarely meet.

    Returns: keys of the steps that this process did. A step that raises stops this process; what is done stays done.
    """
    place = place or Place.from_environment()
    config.keep_in(folder)
    tasks = make_tasks(config)
    work = workspace or Workspace(config, folder, place.device)
    start = len(tasks) * place.rank // place.world
    mine: list[str] = []
    while left := [task for task in tasks[start:] + tasks[:start] if not is_done(folder, task)]:
        keys = {task.key for task in left}
        ready = [task for task in left if not keys.intersection(task.needs)]
        if not any(_try(task, work, folder, mine, say, len(tasks)) for task in ready):
            time.sleep(_WAIT)  # all that is ready is being done by others
    return mine


def _try(task: Task, work: Workspace, folder: Path, mine: list[str], say: Say, total: int) -> bool:
    """Do a step unless another process holds it. True if it was done here."""
    lock = folder / ".locks" / f"{task.key.replace('/', '-')}.lock"
    lock.parent.mkdir(exist_ok=True)
    try:
        with FileLock(lock, timeout=0):
            if is_done(folder, task):
                return True
            begin = time.monotonic()
            task.run(work)
            mine.append(task.key)
            say(f"{task.key}  {time.monotonic() - begin:.0f} s")
            return True
    except Timeout:
        return False


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Run the paper's whole table: train every dictionary, evaluate each, write one report.

    Every step leaves a folder, so that the same command goes on where it was stopped or killed. Processes that
    `torchrun` or `accelerate launch` started share the steps through the folder, on one machine or on several that see
    it."""

    config: tyro.conf.OmitArgPrefixes[ReproduceConfig] = field(default_factory=ReproduceConfig)
    out: Path = Path("writesae-out/reproduce")
    """Folder of the run; the same folder goes on where it stopped."""
    small: bool = False
    """Small numbers, for a trial on a laptop. Flags that are given win over them."""
    estimate: bool = False
    """Say what the run will cost, and stop."""

    @classmethod
    def from_arguments(cls, arguments: Sequence[str]) -> Reproduce:
        """The command line as a value; with `--small`, small numbers are the defaults."""
        default = cls(config=SMALL) if "--small" in arguments else cls()
        return parse(cls, "writesae reproduce", arguments, default)

    def run(self, say: Say = print) -> ReportFiles | None:
        """Print the estimate, then do every step that is not done; None where only the estimate was asked for.

        Raises:
            ValueError: the run cannot be done, the folder holds a run with other settings, or the disk is too small.
        """
        place = Place.from_environment()
        work = Workspace(self.config, self.out, place.device)
        work.check()
        if place.rank == 0:
            cost = estimate(self.config, self.out, work.model)
            say("\n".join(cost.lines()))
            cost.check()
        if self.estimate:
            return None
        run_tasks(self.config, self.out, place=place, workspace=work, say=say)
        return ReportFiles(self.out / "report" / "report.html", self.out / "report" / "report.json")
