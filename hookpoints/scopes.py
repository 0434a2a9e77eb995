"""Scopes that close in any case, and the scope of small work."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import torch

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


@scoped
def own_gradients(device_type: str) -> Iterator[None]:
    """A scope that follows gradients whatever modes its caller is in: neither inference mode nor, for a device of that
    type, autocast. Afterwards the modes of the thread are as before, by whatever the scope ended."""
    lowered = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    precision = torch.autocast(device_type, enabled=False) if lowered else nullcontext()
    with torch._C._InferenceMode(False), precision:  # the guard in C, which an interrupt cannot leave in force
        yield


SMALL_WORK = 1e8
"""Multiply-adds that one thread computes: a training step or an edited row of less than 70 ms on a Zen 4 core. Below,
threads that spin lose more on a busy machine than a second core saves. Above, operations are long, waiting asleep
costs little, and many cores pay."""


def threads_for(multiply_adds: float) -> AbstractContextManager[None]:
    """A scope in which small work has one thread on a CPU; afterwards the number is as before. Takes a microsecond.

    A number in ``OMP_NUM_THREADS`` or ``MKL_NUM_THREADS`` is the user's, and stays.

    Args:
        multiply_adds: of one step or pass.
    """
    if multiply_adds <= SMALL_WORK and {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}.isdisjoint(os.environ):
        return _one_thread()
    return nullcontext()


@scoped
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)
