"""One file per question. An evaluation is found by being here: a file with one `Evaluation` that asks a `question`."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from writesae.experiment.evaluation import Evaluation, Result


def _discover() -> dict[str, type[Evaluation]]:
    """Every evaluation by its kind: in the order of the paper's claims, then by name."""
    classes: list[type[Evaluation]] = []
    for module in pkgutil.iter_modules(__path__):
        contents = vars(importlib.import_module(f"{__name__}.{module.name}")).values()
        classes += [
            each
            for each in contents
            if isinstance(each, type)
            and issubclass(each, Evaluation)
            and each.__module__.endswith(f".{module.name}")
            and "question" in vars(each)
        ]
    classes.sort(key=lambda each: (min(each.answers, default=99), each.kind))
    return {each.kind: each for each in classes}


EVALUATIONS: dict[str, type[Evaluation]] = _discover()
"""Every evaluation by its kind."""


def load_result(folder: str | Path) -> Result:
    """Read a saved result of any kind; ValueError for anything else."""
    return Result.load(folder, EVALUATIONS)


__all__ = ["EVALUATIONS", "Evaluation", "Result", "load_result"]
