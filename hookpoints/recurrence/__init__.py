"""The write: the canonical recurrence, its step-by-step reference and its chunked fast path."""

from hookpoints.recurrence.canonical import CanonicalForm, Index, Loop, ScanResult, carried_keys
from hookpoints.recurrence.recurrence import Method, Recurrence

__all__ = [
    "CanonicalForm",
    "Index",
    "Loop",
    "Method",
    "Recurrence",
    "ScanResult",
    "carried_keys",
]
