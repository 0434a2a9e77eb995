"""The study of the paper WriteSAE (arXiv 2605.12770): evaluations of dictionaries, verdicts and reports.

Every evaluation is in `writesae_study.evaluations`, by its kind in `EVALUATIONS`. Names are imported when they are
asked for, so that `writesae --help` loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from writesae_study.evaluations import EVALUATIONS, load_result
    from writesae_study.evaluations.substitution import Substitution
    from writesae_study.experiment.evaluation import Evaluation, Result
    from writesae_study.page.report import write_report

_HOMES = {
    "evaluations": ("EVALUATIONS", "load_result"),
    "evaluations.substitution": ("Substitution",),
    "experiment.evaluation": ("Evaluation", "Result"),
    "page.report": ("write_report",),
}
__all__ = ["EVALUATIONS", "Evaluation", "Result", "Substitution", "load_result", "write_report"]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        for module, names in _HOMES.items():
            if name in names:
                return getattr(importlib.import_module(f"writesae_study.{module}"), name)
        raise AttributeError(f"module 'writesae_study' has no attribute {name!r}")
