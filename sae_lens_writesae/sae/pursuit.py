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
    scores: Tensor
    """[N,F_key,F_value], p_i^T M v_j of the matrices with all pairs."""

    def acts(self) -> Tensor:
        """[N,F_key*F_value], the coefficient of each pair."""
        numbers = self.keys * self.scores.shape[2] + self.values
        empty = torch.zeros_like(self.scores).flatten(1)
        return empty.scatter_add(1, numbers, self.coefficients)  # what had ended adds 0


def pairs_of(matrices: Tensor, key_atoms: Tensor, value_atoms: Tensor, n: int, stop: float) -> Pairs:
    """Orthogonal matching pursuit of matrices [N,K,V] over pairs of atoms [F_key,K] and [F_value,V], each of norm 1.

    Coefficients are differentiable in the matrices; the choice of pairs is not.

    Args:
        n: at most so many pairs.
        stop: a pair whose score is not above this share of the matrix's norm is not taken, and ends the pursuit.
    """
    key_atoms = key_atoms.detach()
    value_atoms = value_atoms.detach()
    key_gram = key_atoms @ key_atoms.T
    value_gram = value_atoms @ value_atoms.T
    scores = key_atoms @ matrices @ value_atoms.T
    least = stop * matrices.flatten(1).norm(dim=1, keepdim=True)
    numbers = torch.zeros(len(matrices), 0, dtype=torch.long, device=matrices.device)
    active = numbers.bool()
    keys = values = numbers
    coefficients = scores[:, 0, :0]
    left = scores
    for step in range(n):
        if step:
            taken = key_gram[keys] * coefficients[..., None]
            left = torch.baddbmm(scores, taken.mT, value_gram[values], alpha=-1)
        best = left.flatten(1).abs().argmax(1, keepdim=True)
        takes = left.flatten(1).gather(1, best).abs() > least
        active = torch.cat([active, takes & active.all(1, keepdim=True)], 1)
        numbers = torch.cat([numbers, best], 1)
        keys = numbers // len(value_atoms)
        values = numbers % len(value_atoms)
        gram = key_gram[keys[:, :, None], keys[:, None]] * value_gram[values[:, :, None], values[:, None]]
        coefficients = _least_squares(gram, scores.flatten(1).gather(1, numbers), active)
    return Pairs(keys, values, coefficients, scores)


def _least_squares(gram: Tensor, along: Tensor, active: Tensor) -> Tensor:
    """Coefficients [N,n] of the pairs that are `active`, from their inner products [N,n,n] and those with the matrix
    [N,n]; 0 of the others."""
    both = active[:, :, None] & active[:, None]
    unit = torch.eye(along.shape[1], dtype=gram.dtype, device=gram.device)
    wanted = torch.where(active, along, 0)[..., None]
    return torch.linalg.solve_ex(torch.where(both, gram, unit), wanted)[0].squeeze(-1)
