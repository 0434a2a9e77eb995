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
    "mean": "mean write at the atom's norm",
    "head_mean": "mean write",
    "token_mean": "mean write of the token",
    "pair_mean": "mean write of the token pair",
    "drawn": "best of the drawn writes",
    "quantised": "vector quantizer",
    "pca": "principal components",
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
    "head_mean": "the head's mean native write, at its own size, as all that follow",
    "token_mean": "the mean native write of the token: n / (n + m) of it for n occurrences, the rest the head's mean",
    "pair_mean": "the mean native write of the token and the one before it, shrunk in the same way to the token's mean",
    "drawn": "of as many native writes as the dictionary has atoms, drawn at random from other text, the one with the "
    "largest cosine, at its least-squares coefficient",
    "quantised": "the best code of a gain-shape vector quantizer with as many codes of rank 1, times its gain",
    "pca": "the mean write and the write's projection on the first principal components of writes",
    "state_after": "the top singular direction of the state after the write: where a head forgets, that is the write",
}
"""What every condition writes."""

SCALE_NAMES: Mapping[str, str] = {
    "coefficient": "coefficient",
    "matched": "matched norm",
    "least_squares": "least squares",
}
SCALE_DEFINITIONS: Mapping[str, str] = {
    "coefficient": "the SAE's own activation; for baselines their own size",
    "matched": "the norm of the native write",
    "least_squares": "the projection of the native write on the atom, possibly negative (not in the paper)",
    "none": "no scale",
}


def shown_name(condition: str) -> str:
    """The name of a condition, or of "pca r"."""
    head, _, rank = condition.partition(" ")
    return f"{rank} principal component{'s' * (rank != '1')}" if head == "pca" else NAMES.get(condition, condition)
