"""Codes of writes by few numbers: quantizers with gains, residual quantizers, and pursuits.

One encoder serves all (`pursued`): take the matrix that explains most of what is left, subtract its projection, resume.
A dictionary of drawn writes and a vector quantizer take one step. A residual quantizer has another book of codes for
each step, and matching pursuit has one book for all of them.

Alphabet: N matrices, n codes of a book, R terms, K key side, V value side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from sae_lens_writesae.atom.low_rank import LowRank

_BLOCK = 16_000_000
"""Inner products held at once: 64 MB in float32."""


@torch.no_grad()
def best_code(native: LowRank, book: LowRank, *, positive: bool = False) -> Tensor:
    """[N] the code of a book with the largest |cosine| with each matrix, or with the largest cosine."""
    size = book.norm()
    step = max(1, _BLOCK // len(book))
    best = []
    for start in range(0, len(native), step):
        # By the code's norm alone: a matrix has one norm, which does not change which code is best.
        cosines = native.rows(slice(start, start + step)).inners(book) / size
        best.append((cosines if positive else cosines.abs()).argmax(1))
    return torch.cat(best)


def pursued(native: LowRank, books: Sequence[LowRank], *, positive: bool = False) -> LowRank:
    """N matrices as sums of one code of each book, each at its least-squares coefficient for what the books before it
    leave (`positive`: a coefficient below 0 becomes 0). Gradients pass through the coefficients and the codes. Costs
    N n R (K + V) a book."""
    rest = native
    taken = list[LowRank]()
    for book in books:
        code = book.rows(best_code(rest, book, positive=positive))
        size = rest.inner(code) / code.inner(code)
        term = code * (size.relu() if positive else size)
        taken.append(term)
        rest = LowRank.cat([rest, term * -1.0])  # more terms, and never a matrix
    return LowRank.cat(taken)


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
        empty = (torch.bincount(chosen, minlength=len(start)) == 0).nonzero()[:, 0]
        if len(empty):
            worst = writes.rows(unexplained.topk(len(empty)).indices)
            top = LowRank.svd(worst.dense(), 1)
            sides[0][empty] = normalize(top.keys[:, 0], dim=1)
            sides[1][empty] = normalize(top.values[:, 0], dim=1)
    return LowRank.rank_one(*sides)


class Code(NamedTuple):
    """What replaces writes, and how many bits a write then has: log2 of the number of choices, and 8 a coefficient."""

    name: str
    bits: float
    written: Callable[[LowRank], Tensor]
    """[N,K,V] of N matrices."""
    parameters: list[Tensor]
    """Those that `descend` trains."""


def residual_quantizer(writes: LowRank, n: int, stages: int, seed: int) -> list[LowRank]:
    """A book of n codes for each stage (fewer of fewer matrices), from Lloyd's algorithm on what the books before it
    leave. It starts from matrices that are drawn in proportion to their squared norm. Of matrices that are codes
    themselves only rounding is left, which is no matrix to draw; where that holds for all, the book stays the same."""
    generator = torch.Generator().manual_seed(seed)
    rounding = 100 * torch.finfo(writes.keys.dtype).eps * writes.inner(writes)
    rest = writes
    books = list[LowRank]()
    for _ in range(stages):
        square = rest.inner(rest)
        weights = torch.where(square > rounding, square, 0).cpu()
        if books and not weights.any():
            books.append(books[-1])
            continue
        count = min(n, int(weights.count_nonzero()))
        drawn = torch.multinomial(weights, count, generator=generator)
        book = lloyd(rest, rest.rows(drawn))
        books.append(book)
        rest = LowRank.cat([rest, pursued(rest, [book]) * -1.0])
    return books


def of_books(name: str, bits: float, books: Sequence[LowRank], *, positive: bool = False) -> Code:
    """The code of a (residual) quantizer, or of a pursuit, whose books are one."""
    # By identity: a pursuit has one book for all of its steps, and an optimizer takes no tensor twice.
    sides = {id(side): side.requires_grad_() for book in books for side in (book.keys, book.values)}
    return Code(name, bits, lambda x: pursued(x, books, positive=positive).dense(), list(sides.values()))


def centered(code: Code, writes: LowRank) -> Code:
    """The code with a bias with which what it writes is right on average: an error that all writes share adds up in the
    state."""
    K = writes.keys.shape[-1]
    V = writes.values.shape[-1]
    error = writes.values.new_zeros(K, V)
    with torch.no_grad():
        for numbers in torch.arange(len(writes)).split(4096):  # 4,096 matrices of 128 x 128 are 256 MB
            x = writes.rows(numbers)
            error = error + (x.dense() - code.written(x)).sum(0)
    bias = (error / len(writes)).requires_grad_()
    return code._replace(written=lambda x: code.written(x) + bias, parameters=[*code.parameters, bias])


def descend(
    parameters: Sequence[Tensor],
    loss: Callable[[Tensor], Tensor],
    batches: Iterable[Tensor],
    steps: int,
    lr: float,
    clip: float = 1.0,
) -> None:
    """Adam with a cosine to 0 on a loss of the numbers of rows, a batch a step; gradients have norm `clip` at most."""
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _, numbers in zip(range(steps), batches):
        optimizer.zero_grad()
        with torch.enable_grad():
            loss(numbers).backward(inputs=parameters)  # none for the model
        nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        schedule.step()
