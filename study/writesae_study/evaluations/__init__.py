"""One file per question of `verdict.paper.QUESTIONS`. A file is imported when its evaluation is asked for, so that a
list of them loads no torch."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from writesae_study.verdict.paper import QUESTIONS

if TYPE_CHECKING:
    from writesae_study.experiment.evaluation import Evaluation, Result


class _Evaluations(Mapping[str, "type[Evaluation]"]):
    """Every evaluation by its kind; each is imported when it is asked for."""

    def __getitem__(self, kind: str) -> type[Evaluation]:
        class_name = QUESTIONS[kind].class_name  # KeyError before an import
        return getattr(importlib.import_module(f"{__name__}.{kind}"), class_name)

    def __iter__(self) -> Iterator[str]:
        return iter(QUESTIONS)

    def __contains__(self, kind: object) -> bool:
        return kind in QUESTIONS

    def __len__(self) -> int:
        return len(QUESTIONS)


EVALUATIONS: Mapping[str, type[Evaluation]] = _Evaluations()
"""Every evaluation by its kind; each is imported when it is asked for."""


def load_result(folder: str | Path) -> Result:
    """Read a saved result of any kind; ValueError for anything else."""
    from writesae_study.experiment.evaluation import Result

    return Result.load(folder, EVALUATIONS)
