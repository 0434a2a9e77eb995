"""Commands and pages for dictionaries of what recurrent heads write: collect, train, measure, show, publish.

Names are imported when they are asked for, so that `writesae --help` loads no torch. The study of the paper is
another distribution, `writesae-study`, which adds commands.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from writesae.dictionary.quality import dictionary_quality, head_effects
    from writesae.experiment.tokens import sample_sequences
    from writesae.head.writes import half_lives

_HOMES = {
    "head.writes": ("half_lives",),
    "dictionary.quality": ("dictionary_quality", "head_effects"),
    "experiment.tokens": ("sample_sequences",),
}
"""Module -> the names that the package has from it."""

__all__ = [
    "dictionary_quality",
    "half_lives",
    "head_effects",
    "sample_sequences",
]


if not TYPE_CHECKING:  # who checks types would take any name for one that is there

    def __getattr__(name: str) -> object:
        for module, names in _HOMES.items():
            if name in names:
                return getattr(importlib.import_module(f"writesae.{module}"), name)
        raise AttributeError(f"module 'writesae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
