"""What conditions and scales are called, and what they mean, for sentences, figures and tables."""

from __future__ import annotations

from collections.abc import Mapping

NAMES: Mapping[str, str] = {
    "native": "native (no-op)",
    "delete": "delete",
    "atom": "atom",
    "random": "random direction",
    "shuffled": "another atom",
    "elsewhere": "write from elsewhere",
    "state": "state before the write",
    "mean": "mean write",
    "state_after": "state after the write (contains the write)",
}
"""Names of conditions as a reader meets them in sentences, figures and tables."""

DEFINITIONS: Mapping[str, str] = {
    "native": "the native write again, through the edit path: a no-op that measures the floor",
    "delete": "nothing",
    "atom": "the atom, at the scale named",
    "random": "a Gaussian direction of the atom's rank, at the norm of the atom condition (ours)",
    "shuffled": "another alive atom, which does not fire there, at the norm of the atom condition (the paper's random)",
    "elsewhere": "the native write of another position, at the norm of the atom condition",
    "state": "the top singular direction of the state before the write, at the norm of the atom condition",
    "mean": "the head's mean native write, at the norm of the atom condition",
    "state_after": "the top singular direction of the state after the write: where a head forgets, that is the write",
}
"""What every condition writes."""

SCALE_NAMES: Mapping[str, str] = {
    "coefficient": "coefficient",
    "matched": "matched norm",
    "least_squares": "least squares",
}
SCALE_DEFINITIONS: Mapping[str, str] = {
    "coefficient": "the SAE's own activation",
    "matched": "the norm of the native write",
    "least_squares": "the projection of the native write on the atom, possibly negative (not in the paper)",
    "none": "no scale",
}
