"""Fast path (the reference, until the kernel is in place)."""

from __future__ import annotations

from torch import Tensor

from hookpoints import reference
from hookpoints.recurrence import Recurrence, ScanResult


def scan(r: Recurrence, chunk_size: int | None = None) -> ScanResult:
    """See `hookpoints.reference.scan`."""
    return reference.scan(r)


def states(r: Recurrence, positions: list[int], chunk_size: int | None = None) -> Tensor:
    """See `hookpoints.reference.states`."""
    return reference.states(r, positions)


def corrected_values(r: Recurrence, chunk_size: int | None = None) -> Tensor:
    """See `hookpoints.reference.corrected_values`."""
    return reference.corrected_values(r)


def propagate(r: Recurrence, x: Tensor, start: int) -> Tensor:
    """See `hookpoints.reference.propagate`."""
    return reference.propagate(r, x, start)


def project(r: Recurrence, v: Tensor, w: Tensor, feature_block: int | None = None) -> Tensor:
    """See `hookpoints.reference.project`."""
    return reference.project(r, v, w, feature_block)
