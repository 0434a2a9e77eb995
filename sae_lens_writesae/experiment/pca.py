"""Principal components of matrices: the best that a linear code of r numbers can do, without any dictionary."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_NO_VARIANCE = 1e-12
"""A direction with less than this share of the largest variance is rounding."""


class MatrixPca(NamedTuple):
    """Mean and orthonormal components of N matrices of D = K V entries."""

    mean: Tensor
    """[D]"""
    components: Tensor
    """[R,D], by falling variance; R is at most min(N - 1, D)."""

    def project(self, rows: Tensor, rank: int) -> Tensor:
        """[N,D] in the span of the mean and the first `rank` components (all, where there are fewer)."""
        basis = self.components[:rank]
        centred = rows.to(self.mean) - self.mean
        return (self.mean + centred @ basis.T @ basis).to(rows)


def fit_pca(rows: Tensor, rank: int) -> MatrixPca:
    """The first `rank` components of rows [N,D], in float64; directions without variance are left out.

    Cost: an eigendecomposition of the smaller of the N x N and D x D Gram matrices.

    Raises:
        ValueError: fewer than two rows.
    """
    if rows.ndim != 2 or len(rows) < 2:
        raise ValueError(f"principal components need at least two rows [N,D], found {list(rows.shape)}")
    x = rows.double()
    mean = x.mean(0)
    x = x - mean
    wide = len(x) < x.shape[1]
    values, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    varying = int((values > values[-1].clamp_min(0) * _NO_VARIANCE).sum()) if float(values[-1]) > 0 else 0
    top = vectors.flip(1)[:, : min(rank, varying)]
    components = (x.T @ top / (x.T @ top).norm(dim=0)).T if wide else top.T
    return MatrixPca(mean.to(rows.dtype), components.to(rows.dtype))
