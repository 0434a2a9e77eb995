"""A vector quantizer of writes with gains: the best code for each write, and Lloyd's algorithm for the codes.

Alphabet: N matrices, n codes of a book, R terms, K key side, V value side.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sae_lens_writesae.atom.low_rank import LowRank

_BLOCK = 16_000_000
"""Inner products held at once: 64 MB in float32."""


@torch.no_grad()
def best_code(native: LowRank, book: LowRank) -> Tensor:
    """[N] the code of a book with the largest |cosine| with each matrix."""
    size = book.norm()
    step = max(1, _BLOCK // len(book))
    best = []
    for start in range(0, len(native), step):
        # By the code's norm alone: a matrix has one norm, which does not change which code is best.
        best.append((native.rows(slice(start, start + step)).inners(book) / size).abs().argmax(1))
    return torch.cat(best)


def coded(native: LowRank, book: LowRank) -> LowRank:
    """N matrices, each as its best code of a book at the least-squares coefficient. Costs N n R (K + V)."""
    code = book.rows(best_code(native, book))
    return code * (native.inner(code) / code.inner(code))


@torch.no_grad()
def lloyd(writes: LowRank, start: LowRank, passes: int = 10) -> LowRank:
    """Codes [n] of rank 1 and unit norm that Lloyd's algorithm finds for matrices, from `start`.

    The objective is the sum of the squared inner products with the code for which it is largest: what a quantizer with
    gains explains. A pass gives each matrix to its code, then takes a step of the power method on either side of each
    code, from inner products of factors alone; neither lowers the objective. A code that has none is put on the matrix
    of which most is left. Cost: N n R (K + V) a pass.
    """
    top = start if start.rank == 1 else LowRank.svd(start.dense(), 1)
    sides = [normalize(side[:, 0], dim=1) for side in (top.keys, top.values)]
    square = writes.inner(writes)
    for _ in range(passes):
        codes = LowRank.rank_one(*sides)
        chosen = best_code(writes, codes)
        unexplained = square - writes.inner(codes.rows(chosen)).square()
        for side, factors in enumerate((writes.keys, writes.values)):
            # <k_r, a> and <u_r, b> of the terms of each write and the code a b^T that it is given to.
            x = (writes.keys * sides[0][chosen][:, None]).sum(-1)  # [N,R]
            y = (writes.values * sides[1][chosen][:, None]).sum(-1)
            gain = (x * y).sum(1, keepdim=True) * (y if side == 0 else x)
            # The power method on sum_n <W_n, C>^2: a code's side becomes sum_n <W_n, C> W_n b, or W_n^T a.
            step = (factors * gain[..., None]).sum(1)
            moved = torch.zeros_like(sides[side]).index_add_(0, chosen, step)
            size = moved.norm(dim=1, keepdim=True)
            unit = moved / size.clamp_min(torch.finfo(size.dtype).tiny)
            sides[side] = torch.where(size > 0, unit, sides[side])
        # A code without writes goes to those that the book explains worst.
        empty = (torch.bincount(chosen, minlength=len(start)) == 0).nonzero()[:, 0]
        if len(empty):
            worst = writes.rows(unexplained.topk(len(empty)).indices)
            top = LowRank.svd(worst.dense(), 1)
            sides[0][empty] = normalize(top.keys[:, 0], dim=1)
            sides[1][empty] = normalize(top.values[:, 0], dim=1)
    return LowRank.rank_one(*sides)
