"""Which pairs of a key atom and a value atom a matrix is the sum of: orthogonal matching pursuit over all pairs.

A state is a sum of writes, each decayed and partly erased, so that its factors are not known. It is coded as

    M = sum_n c_n p_i(n) v_j(n)^T,

where (Pati et al. 1993) each step takes the pair with the largest |p_i^T R v_j|, R being what the pairs so far leave of
M, and then fits all coefficients again by least squares. Atoms have norm 1. Products of what is left with all pairs
follow from those of M and the Gram matrices of both sides (Rubinstein et al. 2008), so that R is never built:

    p_i^T R v_j = p_i^T M v_j - sum_n c_n (p_i.p_i(n)) (v_j.v_j(n)).

Cost for one matrix: F_key K V + F_key F_value V multiply-adds, and n F_key F_value for the n-th pair. No matrix
[F, K V] is built.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding

LEAST_STOP = 1e-3
"""The smallest share of the norm at which pursuit may stop. Below it float32 does not distinguish a new pair from a
sum of those that were taken."""


class Pairs(NamedTuple):
    """N matrices as sums of at most n pairs."""

    keys: Tensor
    """[N,n] numbers of key atoms, in the order in which pairs were taken."""
    values: Tensor
    """[N,n] numbers of value atoms."""
    coefficients: Tensor
    """[N,n], of atoms of norm 1, with a sign; 0 where the pursuit had ended."""

    def acts(self, f_key: int, f_value: int) -> Tensor:
        """[N,F_key*F_value], the coefficient of each pair."""
        numbers = self.keys * f_value + self.values
        empty = self.coefficients.new_zeros(len(numbers), f_key * f_value)
        return empty.scatter_add(1, numbers, self.coefficients)  # what had ended adds 0

    def dense(self, key_atoms: Tensor, value_atoms: Tensor) -> Tensor:
        """The sums [N,K,V], differentiable in the atoms [F_key,K] and [F_value,V]."""
        keys = embedding(self.keys, key_atoms)
        values = embedding(self.values, value_atoms)
        return (keys * self.coefficients[..., None]).mT @ values


def pair_scores(matrices: Tensor, key_atoms: Tensor, value_atoms: Tensor) -> Tensor:
    """p_i^T M v_j of matrices [...,K,V] with all pairs: [...,F_key,F_value]."""
    return key_atoms @ matrices @ value_atoms.T


def pursue(
    matrices: Tensor, key_atoms: Tensor, value_atoms: Tensor, n: int, stop: float, scores: Tensor | None = None
) -> Pairs:
    """Orthogonal matching pursuit of matrices [N,K,V] over pairs of atoms [F_key,K] and [F_value,V], each of norm 1.

    Coefficients are differentiable in the matrices; the choice of pairs is not.

    Args:
        n: at most so many pairs.
        stop: a pair whose score is not above this share of the matrix's norm is not taken, and ends the pursuit.
        scores: `pair_scores`, where they are at hand.
    """
    key_atoms = key_atoms.detach()
    value_atoms = value_atoms.detach()
    with torch.no_grad():
        if scores is None:
            scores = pair_scores(matrices, key_atoms, value_atoms)
        keys, values, active, gram = _chosen(matrices, key_atoms, value_atoms, n, stop, scores)
    along = ((key_atoms[keys] @ matrices) * value_atoms[values]).sum(-1)
    return Pairs(keys, values, _solved(gram, along, active))


def _chosen(
    matrices: Tensor, key_atoms: Tensor, value_atoms: Tensor, n: int, stop: float, scores: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numbers of key atoms and of value atoms [N,n], whether each pair was taken, and their Gram matrices [N,n,n]."""
    least = stop * matrices.flatten(1).norm(dim=1, keepdim=True)
    key_gram = key_atoms @ key_atoms.T
    value_gram = value_atoms @ value_atoms.T
    first = scores.flatten(1)
    keys = values = torch.zeros(len(matrices), 0, dtype=torch.long, device=matrices.device)
    active = keys.bool()
    gram = along = scores.new_zeros(len(matrices), 0, 0)
    left = first
    for step in range(n):
        if step:
            coefficients = _solved(gram, along, active)
            of_keys = key_gram[keys] * coefficients[..., None]
            left = torch.baddbmm(scores, of_keys.mT, value_gram[values], alpha=-1).flatten(1)
        best = left.abs().argmax(1, keepdim=True)
        takes = left.gather(1, best).abs() > least
        if step:
            takes &= active[:, -1:]
        active = torch.cat([active, takes], 1)
        keys = torch.cat([keys, best // len(value_atoms)], 1)
        values = torch.cat([values, best % len(value_atoms)], 1)
        along = first.gather(1, keys * len(value_atoms) + values)
        gram = key_gram[keys[:, :, None], keys[:, None]] * value_gram[values[:, :, None], values[:, None]]
    return keys, values, active, gram


def _solved(gram: Tensor, along: Tensor, active: Tensor) -> Tensor:
    """Coefficients [N,n] of the pairs that are `active`, by least squares; 0 of the others."""
    both = active[:, :, None] & active[:, None]
    unit = torch.eye(along.shape[1], dtype=gram.dtype, device=gram.device)
    normal = torch.where(both, gram, unit)
    wanted = torch.where(active, along, 0)
    return torch.linalg.solve_ex(normal, wanted[..., None])[0].squeeze(-1)
