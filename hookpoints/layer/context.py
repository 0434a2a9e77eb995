"""What one run of a hooked model carries besides its inputs: edits, recordings, where it starts. A scoped value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from hookpoints.edits.edit import EditPlan
from hookpoints.recurrence.recurrence import Recurrence
from hookpoints.rules import OpResult


class Recorded(NamedTuple):
    """One op call as it ran natively."""

    recurrence: Recurrence
    """Canonical factors, after factor hooks."""
    native: OpResult
    """What the op returned, before edits of writes, states and reads."""


@dataclass(frozen=True)
class Run:
    """The scope that a forward pass runs in."""

    owner: Any = None
    """The attachment that this run is meant for; other hooked models ignore it."""
    plan: EditPlan | None = None
    """Write edits in force."""
    record: dict[int, Recorded] | None = None
    """If given, each recurrent layer leaves its last op call here."""
    first_token: int | None = None
    """Position of the first token of this pass; None: counted from the cache."""
    backend: str | None = None
    """Who computes the native pass; None: as the model was loaded."""
    start_layer: int = 0
    """Blocks below are skipped."""


_NONE = Run()
_RUN: ContextVar[Run | None] = ContextVar("hookpoints_run", default=None)


def current(owner: Any) -> Run:
    """The run in force for ``owner``."""
    run = _RUN.get()
    return run if run is not None and run.owner is owner else _NONE


@contextmanager
def scope(owner: Any, **changes: Any) -> Iterator[Run]:
    """Run with ``changes`` on top of what is in force; restored on exit, whatever happens."""
    run = replace(current(owner), owner=owner, **changes)
    token = _RUN.set(run)
    try:
        yield run
    finally:
        _RUN.reset(token)
