"""Scopes that close in any case."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class _Scope(AbstractContextManager[T]):
    """One of ``contextlib.contextmanager``, closed by whatever ends its entry or exit early.

    Python looks for signals after each call. One that comes as the generator has just been entered leaves it suspended
    and its scope in force, until the traceback that holds it is let go of, which a notebook does at the next error.
    """

    def __init__(self, manager: Any):
        self.manager = manager

    def __enter__(self) -> T:
        try:
            return self.manager.__enter__()
        except BaseException:
            self.manager.gen.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        try:
            return self.manager.__exit__(kind, error, trace)
        except BaseException:
            self.manager.gen.close()
            raise


def scoped(function: Callable[P, Iterator[T]]) -> Callable[P, AbstractContextManager[T]]:
    """As ``contextlib.contextmanager``, for scopes that an interrupt must not leave in force."""
    made = contextmanager(function)

    @functools.wraps(function)
    def scope(*args: P.args, **kwargs: P.kwargs) -> AbstractContextManager[T]:
        return _Scope(made(*args, **kwargs))

    return scope
