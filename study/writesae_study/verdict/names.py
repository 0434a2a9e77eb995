"""What conditions and scales are called in sentences, figures and tables; `Substitution` defines them."""

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

SCALE_NAMES: Mapping[str, str] = {
    "coefficient": "coefficient",
    "matched": "matched norm",
    "least_squares": "least squares",
}


def shown_name(condition: str) -> str:
    """The name of a condition, or of "pca r"."""
    head, _, rank = condition.partition(" ")
    return f"{rank} principal component{'s' * (rank != '1')}" if head == "pca" else NAMES.get(condition, condition)
