"""Orthogonal matching pursuit over pairs, step by step, of one matrix."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def pursued_pairs(
    matrix: Tensor, key_atoms: Tensor, value_atoms: Tensor, n: int, stop: float
) -> list[tuple[int, int, float]]:
    """The pairs (key atom, value atom, coefficient) of a matrix [K,V], in the order in which they are taken. Atoms have
    norm 1."""
    taken: list[tuple[int, int]] = []
    coefficients: list[float] = []
    left = matrix
    for _ in range(n):
        best = (-1.0, 0, 0)
        for i, key in enumerate(key_atoms):
            for j, value in enumerate(value_atoms):
                best = max(best, (abs(float(key @ left @ value)), i, j))
        if best[0] <= stop * float(matrix.norm()):
            break
        taken.append(best[1:])
        columns = torch.stack([torch.outer(key_atoms[i], value_atoms[j]).flatten() for i, j in taken], 1)
        solution = torch.linalg.lstsq(columns, matrix.flatten()[:, None]).solution[:, 0]
        coefficients = solution.tolist()
        left = matrix - (columns @ solution).view(matrix.shape)
    return [(i, j, c) for (i, j), c in zip(taken, coefficients)]
