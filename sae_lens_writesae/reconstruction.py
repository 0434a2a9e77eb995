"""How much of a head's matrices dictionaries give back: of the matrices themselves, and of what queries read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from sae_lens_writesae.firings import HeadHook, Target
from sae_lens_writesae.sae.losses import read_queries


class HeadMatrices(NamedTuple):
    """What one head writes or holds on one sequence."""

    matrices: Tensor
    """[T,K,V] writes, or states after each token."""
    queries: Tensor
    """[T,K] the query that reads the state of each token."""


class Reconstruction(NamedTuple):
    """Of some dictionaries on some sequences."""

    table: pd.DataFrame
    """sae, sequence, explained, reads, l0."""
    without_variance: int
    """Sequences left out because their matrices, or all reads of them, are alike."""


def head_matrices(model: Any, tokens: Tensor, hook: HeadHook) -> HeadMatrices:
    """Of tokens [1,T]. Cost: one forward up to the layer, and T K V numbers."""
    one = model.recurrence(tokens, hook.layer).select(heads=hook.head)
    matrices = matrices_of(one, hook.target)
    return HeadMatrices(matrices, read_queries(one)[0, :, 0].to(matrices.dtype))


def matrices_of(one: Any, target: Target) -> Tensor:
    """[T,K,V] writes, or states after each token, of the recurrence of one head on one sequence."""
    return (one.states() if target == "state" else one.write())[0, :, 0]


def reconstructed(sae: Any, acts: Tensor, like: Tensor) -> Tensor:
    """Decoded activations [T,F] as matrices of the shape and dtype of `like` [T,K,V]."""
    return sae.decode(acts).view(like.shape).to(like)


def encoded(sae: Any, matrices: Tensor) -> Tensor:
    """Activations [T,F] of matrices [T,K,V], in the dtype of the SAE."""
    place = next(sae.parameters())
    return sae.encode(matrices.flatten(1).to(place.device, place.dtype))


@torch.no_grad()
def reconstruction(model: Any, saes: Mapping[str, Any], tokens: Tensor) -> Reconstruction:
    """By dictionary and sequence, for dictionaries of any hooks and tokens [N,T]:

    * `explained`: 1 - sum_t |X_t - X^_t|^2 / sum_t |X_t - mean|^2, the mean over all N T tokens (a share of variance).
    * `reads`: 1 - sum_t |(X_t - X^_t)^T q_t|^2 / sum_t |X_t^T q_t|^2, the share of what is read.
    * `l0`: atoms active per token.

    Both shares are 1 for a perfect dictionary, and have no lower bound. Cost: N forwards per hook up to its layer, and
    an encode and decode of N T matrices per dictionary.
    """
    hooks = {label: HeadHook.of(sae) for label, sae in saes.items()}
    rows: list[dict[str, Any]] = []
    lost: set[tuple[str, int]] = set()
    for name in dict.fromkeys(hook.name for hook in hooks.values()):
        hook = HeadHook.parse(name)
        found: list[dict[str, Any]] = []
        total, squares, sums = 0, [], []
        for i in range(len(tokens)):
            x = head_matrices(model, tokens[i : i + 1], hook)
            flat = x.matrices.flatten(1).double()
            total, _ = total + len(flat), squares.append(float(flat.square().sum()))
            sums.append(flat.sum(0))
            for label in (label for label, own in hooks.items() if own.name == name):
                found.append({"sae": label, "sequence": i} | _errors(saes[label], x))
        mean = torch.stack(sums).sum(0) / total
        for row in found:
            i = row["sequence"]
            variance = squares[i] - 2 * float(mean @ sums[i]) + tokens.shape[1] * float(mean @ mean)
            if variance <= 1e-12 * squares[i] or row["read"] == 0:
                lost.add((name, i))
                continue
            shares = {"explained": 1 - row["error"] / variance, "reads": 1 - row["read_error"] / row["read"]}
            rows.append({"sae": row["sae"], "sequence": i, **shares, "l0": row["l0"]})
    return Reconstruction(pd.DataFrame(rows, columns=["sae", "sequence", "explained", "reads", "l0"]), len(lost))


def _errors(sae: Any, x: HeadMatrices) -> dict[str, float]:
    acts = encoded(sae, x.matrices)
    error = x.matrices - reconstructed(sae, acts, x.matrices)

    def read(m: Tensor) -> float:
        return float(torch.einsum("tkv,tk->tv", m, x.queries).double().square().sum())

    return {
        "error": float(error.double().square().sum()),
        "read_error": read(error),
        "read": read(x.matrices),
        "l0": float((acts > 0).sum(1).float().mean()),
    }
