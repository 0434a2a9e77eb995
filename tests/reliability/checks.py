"""A check makes comparisons. Broken products that checks must catch are rows of `tools/mutants/definitions.toml`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

REFUSED = "refused by name"
"""An error of this project, or of the operating system, that names the folder."""


class Comparison(NamedTuple):
    """What was expected, and what was got."""

    what: str
    expected: object
    got: object

    def holds(self) -> bool:
        return same(self.expected, self.got)


def same(a: object, b: object) -> bool:
    """Equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, pd.DataFrame):
        return isinstance(b, pd.DataFrame) and a.equals(b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


@dataclass(frozen=True)
class Check:
    """Comparisons, and how often they are made."""

    run: Callable[[Path, int], Iterator[Comparison]]
    """Called with an empty folder and a number of rounds."""
    few: int
    """Rounds in the test suite."""
    many: int
    """Rounds of `tools/run_reliability.py`."""
    slow: bool

    @property
    def name(self) -> str:
        return self.run.__name__


CHECKS: list[Check] = []


Run = Callable[[Path, int], Iterator[Comparison]]


def check(few: int = 1, many: int = 1, slow: bool = False) -> Callable[[Run], Run]:
    """Add a function to ``CHECKS``."""

    def add(run: Run) -> Run:
        CHECKS.append(Check(run, few, many, slow))
        return run

    return add


def outcome(act: Callable[..., object], *args: object, says: str = "") -> object:
    """What ``act(*args)`` returns, ``REFUSED`` where an error names the path among ``args`` (and ``says``), or the
    error."""
    folder = next(str(each) for each in args if isinstance(each, Path))
    try:
        return act(*args)
    except (ValueError, OSError) as error:
        named = folder in str(error) and says in str(error)
        return REFUSED if named else f"{type(error).__name__} without a name: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
