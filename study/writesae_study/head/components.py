"""Principal components of writes: the best that a linear code of r numbers can do, without any dictionary."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, svds
from torch import Tensor

from sae_lens_writesae.atom.low_rank import LowRank

_NO_VARIANCE = 1e-12
"""A direction with less than this share of the mean square is rounding."""


class MatrixPca(NamedTuple):
    """Mean and orthonormal components of N matrices of D = K V entries."""

    mean: Tensor
    """[D]"""
    components: Tensor
    """[R,D], by falling variance; R is at most min(N, D) - 1."""

    def project(self, rows: Tensor, rank: int) -> Tensor:
        """[N,D] in the span of the mean and the first `rank` components (all, where there are fewer)."""
        basis = self.components[:rank]
        centred = rows.to(self.mean) - self.mean
        return (self.mean + centred @ basis.T @ basis).to(rows)


def fit_pca(writes: LowRank, rank: int) -> MatrixPca:
    """The first `rank` components of N writes from their factors, in float64; directions without variance are left out.

    Neither an N x D nor a D x D matrix is built. Cost: N K V multiplications for each product of Lanczos' method,
    some dozens of them.
    """
    exact = writes.to(torch.float64)
    keys = exact.keys.flatten(0, 1).cpu().numpy()  # [N R,K]
    values = exact.values.flatten(0, 1).cpu().numpy()  # [N R,V]
    mean = keys.T @ values / len(writes)

    def scores(axis: np.ndarray) -> np.ndarray:
        """[N] <W_n - mean, axis>: of each term k u^T it is k^T axis u."""
        matrix = axis.reshape(mean.shape)
        of_terms = ((keys @ matrix) * values).reshape(len(writes), -1)
        return of_terms.sum(1) - (mean * matrix).sum()

    def sums(weights: np.ndarray) -> np.ndarray:
        """[D] sum_n weights_n (W_n - mean)."""
        of_terms = keys * weights.repeat(writes.rank)[:, None]
        return (of_terms.T @ values - weights.sum() * mean).ravel()

    square = float(exact.inner(exact).sum())
    variance = square - len(writes) * (mean**2).sum()
    centred = LinearOperator((len(writes), mean.size), matvec=scores, rmatvec=sums, dtype=np.float64)  # pyright: ignore
    components = np.empty((0, mean.size))
    if variance > _NO_VARIANCE * square:
        count = min(rank, len(writes) - 1, mean.size - 1)
        _, sizes, axes = svds(centred, count, random_state=0)  # pyright: ignore
        order = np.argsort(-sizes)  # svds gives the smallest first
        has_variance = sizes[order] ** 2 > _NO_VARIANCE * square
        components = axes[order[has_variance]]
    return MatrixPca(torch.from_numpy(mean.ravel()).to(writes.values), torch.from_numpy(components).to(writes.values))
