"""A check makes comparisons, and ships broken products that it must catch."""

from __future__ import annotations

import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import CodeType
from typing import NamedTuple

import pandas as pd
import torch

REFUSED = "refused by name"
"""An error of this project, or of the operating system, that names the folder."""


class Change(NamedTuple):
    """Text of one function of the product that is replaced, wherever it occurs there."""

    function: str
    """``module:name``."""
    old: str
    new: str


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
    """One line of the page."""

    section: str
    run: Callable[[Path, int], Iterator[Comparison]]
    """Called with an empty folder and a number of rounds; its docstring says what is done and compared."""
    broken: Mapping[str, Sequence[Change]]
    """Products that the check must catch."""
    few: int
    """Rounds in the test suite."""
    many: int
    """Rounds for the page."""
    slow: bool

    @property
    def name(self) -> str:
        return self.run.__name__

    def catches(self, broken: str, work: Path) -> bool:
        """Whether a comparison fails with that broken product, or it raises what the product as it is does not."""
        with breaking(self.broken[broken]):
            both = (each for n in (self.few, self.many) for each in self.run(work / str(n), n))
            try:
                return any(not each.holds() for each in both)
            except Exception:
                return True


CHECKS: list[Check] = []


def check(
    section: str, broken: Mapping[str, Sequence[Change]], few: int = 1, many: int = 1, slow: bool = False
) -> Callable[[Callable[[Path, int], Iterator[Comparison]]], Callable[[Path, int], Iterator[Comparison]]]:
    """Add a function to ``CHECKS``."""

    def add(run: Callable[[Path, int], Iterator[Comparison]]) -> Callable[[Path, int], Iterator[Comparison]]:
        CHECKS.append(Check(section, run, broken, few, many, slow))
        return run

    return add


@contextmanager
def breaking(changes: Sequence[Change]) -> Iterator[None]:
    """In this scope the product is the broken one. Code objects are replaced, so that every name of a function has the
    change."""
    with ExitStack() as undo:
        for target in dict.fromkeys(change.function for change in changes):
            module, _, name = target.partition(":")
            function = inspect.unwrap(attrgetter(name)(importlib.import_module(module)))
            source = textwrap.dedent(inspect.getsource(function))
            for _, old, new in (change for change in changes if change.function == target):
                assert old in source, f"{target} has no {old!r}"
                source = source.replace(old, new)
            made = compile(source, inspect.getfile(function), "exec", dont_inherit=True).co_consts
            (code,) = [x for x in made if isinstance(x, CodeType) and x.co_name == function.__name__]
            undo.callback(setattr, function, "__code__", function.__code__)
            function.__code__ = code
        yield


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
