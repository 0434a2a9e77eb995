"""The paper's whole table for one model: train, evaluate, report; resumable at every step, over many processes.

`config` says what a run covers, `tasks` makes its steps, `workspace` does one, `run` does those that are left,
`estimate` says beforehand what it costs.
"""

from sae_lens_writesae.reproduce.config import SMALL, ReproduceConfig
from sae_lens_writesae.reproduce.estimate import DiskTooSmallError, Estimate, estimate
from sae_lens_writesae.reproduce.run import Place, run_tasks
from sae_lens_writesae.reproduce.tasks import Task, make_tasks
from sae_lens_writesae.reproduce.workspace import Workspace

__all__ = [
    "SMALL",
    "DiskTooSmallError",
    "Estimate",
    "Place",
    "ReproduceConfig",
    "Task",
    "Workspace",
    "estimate",
    "make_tasks",
    "run_tasks",
]
