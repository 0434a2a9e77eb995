"""Matrices as sums of few outer products: writes, atoms and controls, without building a K x V matrix.

Matrix n is A_n = sum_r keys[n,r] values[n,r]^T. Inner products need the factors alone, because
<v k^T, x y^T> = (v.x)(k.y); so does everything that follows from them (norm, cosine, projection).

Alphabet: N matrices, R terms each, K key side, V value side; key-first everywhere. The terms of a matrix need not be
orthogonal, and the same matrix has many factorizations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product

import torch
from torch import Tensor

AtomIndex = slice | Tensor | list[int]


@dataclass(frozen=True, eq=False)
class LowRank:
    """N matrices [K,V], each a sum over r of keys[n,r] values[n,r]^T.

    Raises:
        ValueError: the sides do not agree on N and R.
    """

    keys: Tensor
    """[N,R,K]"""
    values: Tensor
    """[N,R,V]"""

    def __post_init__(self) -> None:
        if self.keys.ndim != 3 or self.values.ndim != 3 or self.keys.shape[:2] != self.values.shape[:2]:
            raise ValueError(
                "low-rank matrices have keys [N,R,K] and values [N,R,V], got "
                f"{list(self.keys.shape)} and {list(self.values.shape)}"
            )

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def rank(self) -> int:
        """R, the number of terms: an upper bound of the matrices' rank."""
        return self.keys.shape[1]

    # ------------------------------------------------------------------------------------------ making

    @classmethod
    def rank_one(cls, keys: Tensor, values: Tensor) -> LowRank:
        """N rank-1 matrices from keys [N,K] and values [N,V]."""
        return cls(keys[:, None], values[:, None])

    @classmethod
    def svd(cls, matrices: Tensor, rank: int | None = None, *, balanced: bool = False) -> LowRank:
        """The closest matrices of rank `rank` to [N,K,V], largest term first; exact without `rank`.

        The singular values go to the keys, or with `balanced` their square roots to both sides. Computed in at least
        float32 and returned in the dtype of `matrices`. Cost: one K x V SVD for each matrix.
        """
        exact = torch.promote_types(matrices.dtype, torch.float32)
        left, sigma, right = torch.linalg.svd(matrices.to(exact), full_matrices=False)
        left = left[..., :rank].mT
        sigma = sigma[:, :rank, None]
        right = right[:, :rank]
        # Roots on both sides give Adam, whose steps have one size, equal sides to turn.
        if balanced:
            root = sigma.sqrt()
            return cls((left * root).to(matrices), (right * root).to(matrices))
        return cls((left * sigma).to(matrices), right.to(matrices))

    @classmethod
    def cat(cls, summands: Sequence[LowRank]) -> LowRank:
        """The sum of matrices, term by term: the result has the terms of all `summands`, which share N, K and V."""
        return cls(torch.cat([s.keys for s in summands], 1), torch.cat([s.values for s in summands], 1))

    def random_like(self, generator: torch.Generator) -> LowRank:
        """Gaussian factors of the same shapes, drawn on the CPU so that a seed means the same on every device."""
        return LowRank(*(torch.randn(side.shape, generator=generator).to(side) for side in (self.keys, self.values)))

    # ------------------------------------------------------------------------------------------ choosing

    def rows(self, index: AtomIndex) -> LowRank:
        """Some of the N matrices, by slice, mask or indices."""
        return LowRank(self.keys[index], self.values[index])

    def terms(self, index: AtomIndex) -> LowRank:
        """Every matrix restricted to some of its R terms, by slice, mask or indices."""
        return LowRank(self.keys[:, index], self.values[:, index])

    def expand(self, n: int) -> LowRank:
        """A single matrix (N = 1) as n equal ones, without copying."""
        return LowRank(self.keys.expand(n, -1, -1), self.values.expand(n, -1, -1))

    def to(self, like: Tensor | torch.dtype | torch.device) -> LowRank:
        """The same matrices in another dtype, on another device, or as those of a tensor."""
        return LowRank(self.keys.to(like), self.values.to(like))

    def on_host(self) -> LowRank:
        """The same on the host; both sides cross together, so that a GPU is waited for once."""
        if self.keys.device.type == "cpu":
            return self
        sides = torch.cat([self.keys, self.values], -1).cpu()
        return LowRank(*sides.split([self.keys.shape[-1], self.values.shape[-1]], -1))

    def dense(self) -> Tensor:
        """The matrices [N,K,V]. Costs N R K V and as much memory as they need; meant for tests and figures."""
        return self.keys.mT @ self.values

    # ------------------------------------------------------------------------------------------ arithmetic

    def __mul__(self, scale: Tensor | float) -> LowRank:
        """Each matrix times a number, [N] or one for all; the scale goes to the values."""
        return LowRank(self.keys, self.values * (scale[..., None, None] if isinstance(scale, Tensor) else scale))

    def inner(self, other: LowRank) -> Tensor:
        """Frobenius inner products <A_n, B_n> [N]. Costs N R R' (K + V)."""
        return ((self.keys @ other.keys.mT) * (self.values @ other.values.mT)).sum((1, 2))

    def total(self) -> LowRank:
        """The sum of all N matrices, as one (N = 1) with all of their terms."""
        return LowRank(self.keys.flatten(0, 1)[None], self.values.flatten(0, 1)[None])

    def norm(self) -> Tensor:
        """Frobenius norms [N], exact whether or not the terms are orthogonal."""
        return self.inner(self).clamp_min(0).sqrt()

    def with_norm(self, target: Tensor) -> LowRank:
        """Each matrix rescaled by a positive number to Frobenius norm `target` [N].

        Raises:
            ValueError: a matrix is zero, and has no direction to rescale.
        """
        size = self.norm()
        if (size == 0).any():
            raise ValueError(f"matrix {int((size == 0).nonzero()[0])} is zero and has no direction to rescale")
        return self * (target / size)

    def cosine(self, other: LowRank) -> Tensor:
        """Signed cosines <A_n, B_n> / |A_n||B_n| [N]; 0 where either matrix is zero.

        For rank 1 this is the cosine of the keys times the cosine of the values.
        """
        return _safe_ratio(self.inner(other), self.norm() * other.norm())

    def cosines(self, other: LowRank) -> Tensor:
        """Signed cosines of all pairs [N,M]; 0 where either matrix is zero. Costs N M R R' (K + V)."""
        return _safe_ratio(self.inners(other), self.norm()[:, None] * other.norm()[None, :])

    def inners(self, other: LowRank) -> Tensor:
        """Frobenius inner products of all pairs [N,M]. Costs N M R R' (K + V)."""
        return inner_products(self.keys, self.values, other.keys, other.values)


def inner_products(keys: Tensor, values: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """<X_n, A_f> [...,N,F] of sum_s k_s u_s^T [...,N,S,K], [...,N,S,V] and sum_r v_r w_r^T [...,F,R,K], [...,F,R,V]."""
    terms = product(range(keys.shape[-2]), range(v.shape[-2]))
    # (k_s . v_r) (u_s . w_r), one pair of terms at a time: all pairs would take S R times the memory.
    return reduce(
        torch.add,
        ((keys[..., s, :] @ v[..., r, :].mT) * (values[..., s, :] @ w[..., r, :].mT) for s, r in terms),
    )


def _safe_ratio(inner: Tensor, size: Tensor) -> Tensor:
    # Clamped before the division: the branch that is not taken would have a NaN gradient.
    return torch.where(size > 0, inner / size.clamp_min(torch.finfo(size.dtype).tiny), 0)
