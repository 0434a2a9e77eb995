"""The study of the paper WriteSAE (arXiv 2605.12770): evaluations of dictionaries, verdicts, pages and commands.

Names are imported when they are asked for, so that `writesae --help` loads no torch. Every evaluation is in
`writesae.evaluations`, by its kind in `EVALUATIONS`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from writesae.dictionary.quality import dictionary_quality, head_effects
    from writesae.evaluations import EVALUATIONS, load_result
    from writesae.evaluations.substitution import Substitution
    from writesae.experiment.evaluation import Evaluation, Result
    from writesae.experiment.tokens import sample_sequences
    from writesae.head.writes import half_lives
    from writesae.page.report import write_report

_HOMES = {
    "evaluations": ("EVALUATIONS", "load_result"),
    "evaluations.substitution": ("Substitution",),
    "experiment.evaluation": ("Evaluation", "Result"),
    "head.writes": ("half_lives",),
    "dictionary.quality": ("dictionary_quality", "head_effects"),
    "experiment.tokens": ("sample_sequences",),
    "page.report": ("write_report",),
}
"""Module -> the names that the package has from it."""

__all__ = [
    "EVALUATIONS",
    "Evaluation",
    "Result",
    "Substitution",
    "dictionary_quality",
    "half_lives",
    "head_effects",
    "load_result",
    "sample_sequences",
    "write_report",
]


if not TYPE_CHECKING:  # who checks types would take any name for one that is there

    def __getattr__(name: str) -> object:
        for module, names in _HOMES.items():
            if name in names:
                return getattr(importlib.import_module(f"writesae.{module}"), name)
        raise AttributeError(f"module 'writesae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
