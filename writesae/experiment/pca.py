"""Principal components of matrices: the best that a linear code of r numbers can do, without any dictionary."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sae_lens_writesae.atom.low_rank import LowRank

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


def fit_pca_of_writes(writes: LowRank, rank: int, seed: int = 0, *, spare: int = 6, passes: int = 16) -> MatrixPca:
    """`fit_pca` of N writes from their factors, in float64: neither an N x D nor a D x D matrix is built.

    Subspace iteration with `spare` further directions, then the principal axes within the subspace. Exact where the
    writes have no more than rank + spare components; otherwise the components that it finds hold the variance of the
    best ones but for a share of about (v_next / v_rank)^(2 passes), v_next being the variance of the first component
    beyond the spare ones.

    Cost: N K V (rank + spare) multiplications for each pass.

    Raises:
        ValueError: fewer than two writes.
    """
    if len(writes) < 2:
        raise ValueError(f"principal components need at least two writes, found {len(writes)}")
    keys, values = writes.keys.flatten(0, 1).double(), writes.values.flatten(0, 1).double()  # [N R,K], [N R,V]
    shape = (len(writes), writes.rank)
    mean = keys.T @ values / len(writes)
    n = min(rank + spare, len(writes) - 1, mean.numel())
    drawn = torch.randn(*mean.shape, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis = torch.linalg.qr(drawn.to(mean.device).flatten(0, 1))[0]  # [D,n]

    def centred_scores() -> Tensor:
        each = [((keys @ m) * values).sum(1).view(shape).sum(1) for m in basis.T.view(n, *mean.shape)]
        scores = torch.stack(each, 1)
        return scores - scores.mean(0)  # the scores of the mean are the mean of the scores

    for _ in range(passes):
        weights = centred_scores().repeat_interleave(writes.rank, 0)
        moved = [((keys * weights[:, j, None]).T @ values).flatten() for j in range(n)]
        basis = torch.linalg.qr(torch.stack(moved, 1))[0]
    scores = centred_scores()
    variances, turned = torch.linalg.eigh(scores.T @ scores)
    varying = int((variances > variances[-1].clamp_min(0) * _NO_VARIANCE).sum()) if float(variances[-1]) > 0 else 0
    components = (basis @ turned.flip(1)[:, : min(rank, varying)]).T
    return MatrixPca(mean.flatten().to(writes.values), components.to(writes.values))
