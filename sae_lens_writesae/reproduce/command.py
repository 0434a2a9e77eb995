"""`writesae reproduce`: the paper's whole table for a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from sae_lens_writesae.page.report import ReportFiles
from sae_lens_writesae.reproduce.config import SMALL, ReproduceConfig
from sae_lens_writesae.reproduce.estimate import estimate
from sae_lens_writesae.reproduce.run import Place, run_tasks
from sae_lens_writesae.reproduce.workspace import Workspace


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

    def run(self, say: Callable[[str], object] = print) -> ReportFiles | None:
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


SMALL_RUN = Reproduce(config=ReproduceConfig(**SMALL))
"""Defaults of the command with `--small`."""
