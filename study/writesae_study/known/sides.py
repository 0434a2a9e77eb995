"""Codes of writes: of one side, and of a write made of two sides or of a dictionary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from sklearn.cluster import KMeans, kmeans_plusplus
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from sae_lens_writesae import LowRank
from writesae_study.codes.books import descend

LR = 3e-3
"""Learning rate of Adam."""
BATCH = 256
"""Rows of a step, the same for all that is trained."""
GRID = (16, 24, 32, 48, 64, 96)
"""Numbers of atoms of a side that are tried."""
TOLERANCE = 0.02
"""Of the sizes whose explained variance on held-out writes is this near to that of the best, the smallest is taken:
fewest atoms, then fewest active ones."""
RESTARTS = 8
"""Fits of an additive quantizer, of which the best is taken."""
PASSES = 25
"""Passes of each over the rows."""
MOST_SUMS = 4096
"""Sums of one code of each book that an additive quantizer may have."""


class CodedSide(NamedTuple):
    """A code of one side of N writes."""

    code: Tensor
    """[N,F]"""
    atoms: Tensor
    """[F,K] or [F,V]"""
    bits: float
    """Of one code: log2 of the number of choices, and 8 for each coefficient."""

    @property
    def rows(self) -> Tensor:
        """[N,K] or [N,V], what it reconstructs."""
        return self.code @ self.atoms

    @property
    def strongest(self) -> Tensor:
        """[N] number of the atom that contributes most."""
        return (self.code * self.atoms.norm(dim=1)).abs().argmax(1)


class HeadCode(NamedTuple):
    """A code of the N writes of one head."""

    key_atom: Tensor
    """[N] number of the strongest atom of the key side."""
    value_atom: Tensor
    """[N] number of the strongest atom of the value side."""
    contribution: Tensor
    """[N,F] coefficient of each value atom in u, along the native key."""
    values: Tensor
    """[F,V] value atoms."""
    written: Tensor
    """[N,K,V] reconstructions."""
    parameters: int
    """Numbers in the decoder."""
    bits: float
    """Of one code."""


class Size(NamedTuple):
    """Of one vector autoencoder."""

    atoms: int
    active: int
    seed: int = 0


def code_bits(n: int, k: int) -> float:
    """Of k active ones of n atoms, with their coefficients."""
    return math.log2(math.comb(n, k)) + 8 * k


# ------------------------------------------------------------------------------------------------ of one side


def vector_topk(
    rows: Tensor, sizes: Sequence[Size], steps: int, fitted: int | None = None, lr: float = LR
) -> list[CodedSide]:
    """TopK autoencoders of vectors [N,D], one for each size, trained side by side on the first `fitted` rows: a tied
    start from rows, no biases, Adam with a cosine, batches of `BATCH`."""
    train = rows[:fitted]
    scale = rows.norm(dim=1).mean()
    widest = max(size.atoms for size in sizes)
    longest = max(size.active for size in sizes)
    start = torch.zeros(len(sizes), widest, rows.shape[1])
    for m, size in enumerate(sizes):
        centers, _ = kmeans_plusplus(train.numpy(), size.atoms, random_state=size.seed)
        start[m, : size.atoms] = normalize(torch.tensor(centers), dim=1)
    atoms = start.clone().requires_grad_()
    encoder = start.clone().requires_grad_()
    # Sizes differ: what one autoencoder lacks is masked, [M,1,F] and [M,1,k].
    absent = torch.arange(widest) >= torch.tensor([size.atoms for size in sizes])[:, None, None]
    idle = torch.arange(longest) >= torch.tensor([size.active for size in sizes])[:, None, None]

    def encode(x: Tensor) -> Tensor:
        """[M,N,F] of [N,D]."""
        top = (x @ encoder.mT).masked_fill(absent, -1.0).topk(longest, dim=-1)
        kept = top.values.clamp_min(0).masked_fill(idle, 0)
        return torch.zeros(*kept.shape[:2], widest).scatter(-1, top.indices, kept)

    def loss(numbers: Tensor) -> Tensor:
        x = rows[numbers] / scale
        errors = encode(x) @ atoms - x
        return errors.square().sum(-1).mean(1).sum()

    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randint(len(train), (BATCH,), generator=generator) for _ in range(steps))
    descend([atoms, encoder], loss, drawn, steps, lr, clip=math.inf)
    with torch.no_grad():
        codes = encode(rows / scale) * scale
    sides = []
    for m, size in enumerate(sizes):
        code = codes[m, :, : size.atoms]
        sides.append(CodedSide(code, atoms[m, : size.atoms].detach(), code_bits(size.atoms, size.active)))
    return sides


def choose_size(rows: Tensor, active: Sequence[int], steps: int, lr: float = LR) -> Size:
    """Without labels, by the rule of `TOLERANCE`, from vector autoencoders of all sizes."""
    sizes = [Size(n, k) for n in GRID for k in active]
    fitted = len(rows) * 7 // 8
    held_out = rows[fitted:]
    left = [(side.rows - rows)[fitted:].square().sum() for side in vector_topk(rows, sizes, steps, fitted, lr)]
    variance = (held_out - rows.mean(0)).square().sum()
    most = min(left) + TOLERANCE * variance
    return next(size for size, each in zip(sizes, left) if each <= most)


def kmeans(rows: Tensor, n: int, seed: int) -> CodedSide:
    """A quantizer of n codes."""
    fitted = KMeans(min(n, len(rows)), n_init="auto", random_state=seed).fit(rows.numpy())
    atoms = torch.tensor(fitted.cluster_centers_).to(rows)
    chosen = one_hot(torch.tensor(fitted.labels_).long(), len(atoms)).to(rows)
    return CodedSide(chosen, atoms, math.log2(n))


def residual(rows: Tensor, n: int, seed: int) -> CodedSide:
    """Two quantizers of n / 2 codes, the second one of what the first one leaves."""
    first = kmeans(rows, n // 2, seed)
    second = kmeans(rows - first.rows, n // 2, seed)
    return CodedSide(
        torch.cat([first.code, second.code], 1), torch.cat([first.atoms, second.atoms]), first.bits + second.bits
    )


def nearest_codes(rows: Tensor, books: Tensor) -> Tensor:
    """[N,M] the code of each of M books [M,n,D] whose sum is nearest to each row. Tries all n^M sums."""
    book = torch.arange(len(books))
    choices = torch.cartesian_prod(*[torch.arange(books.shape[1])] * len(books)).view(-1, len(books))
    sums = books[book, choices].sum(1)
    best = (2 * rows @ sums.T - sums.square().sum(1)).argmax(1)
    return choices[best]


def summed(rows: Tensor, books: Tensor) -> Tensor:
    """[N,D] what an additive quantizer makes of rows."""
    return books[torch.arange(len(books)), nearest_codes(rows, books)].sum(1)


def additive_books(rows: Tensor, n_books: int, n: int, seed: int) -> tuple[float, Tensor]:
    """Books [M,n,D] of an additive quantizer, and its squared error (Babenko and Lempitsky, 2014): alternating least
    squares from k-means of what the books before leave. Noise that falls to 0 is added to the rows that are coded, so
    that codes leave poor places (Martinez et al., 2018)."""
    generator = torch.Generator().manual_seed(seed)
    starts = list[Tensor]()
    left = rows
    for number in range(n_books):
        start = kmeans(left, n, 10 * seed + number)
        starts.append(start.atoms)
        left = left - start.rows
    books = torch.stack(starts)
    for step in range(PASSES):
        warmth = max(0.0, 1 - step / (0.7 * PASSES))
        noise = warmth * rows.std(0) * torch.randn(rows.shape, generator=generator)
        code = one_hot(nearest_codes(rows + noise, books), n).flatten(1).to(rows)
        gram = code.T @ code + 1e-3 * torch.eye(n_books * n)
        books = torch.linalg.solve(gram, code.T @ rows).view(n_books, n, -1)
    return float((rows - summed(rows, books)).square().sum()), books


def additive(rows: Tensor, n: int, seed: int) -> CodedSide:
    """An additive quantizer of at most n codes in all, the best of `RESTARTS`. The number of books is chosen without
    labels, by the rule of `TOLERANCE`."""
    fitted = len(rows) * 7 // 8
    numbers = [m for m in (1, 2, 3, 4) if (n // m) ** m <= MOST_SUMS]

    def best(x: Tensor, n_books: int) -> Tensor:
        tries = [additive_books(x, n_books, n // n_books, RESTARTS * seed + start) for start in range(RESTARTS)]
        _, books = min(tries, key=lambda fit: fit[0])
        return books

    left = {m: (summed(rows, best(rows[:fitted], m)) - rows)[fitted:].square().sum() for m in numbers}
    variance = (rows - rows.mean(0))[fitted:].square().sum()
    most = min(left.values()) + TOLERANCE * variance
    books = best(rows, next(m for m in numbers if left[m] <= most))
    code = one_hot(nearest_codes(rows, books), books.shape[1]).flatten(1).to(rows)
    return CodedSide(code, books.flatten(0, 1), len(books) * math.log2(books.shape[1]))


def svd(rows: Tensor, n: int, seed: int, bits_most: float = math.inf) -> CodedSide:
    """The first right singular vectors: at most n, and coefficients of at most so many bits. Seeds do not differ."""
    directions = torch.linalg.svd(rows, full_matrices=False)[2]
    atoms = directions[: int(min(n, bits_most / 8))]
    return CodedSide(rows @ atoms.T, atoms, 8.0 * len(atoms))


def of_labels(rows: Tensor, labels: Tensor) -> CodedSide:
    """The vectors that explain rows best, given which ones each is the sum of [N,F]: not a method, but the truth."""
    vectors = torch.linalg.lstsq(labels, rows, driver="gelsd").solution
    return CodedSide(labels, vectors, math.log2(labels.shape[1]))


# ------------------------------------------------------------------------------------------------ of writes


@torch.no_grad()
def of_sides(key: CodedSide, value: CodedSide) -> HeadCode:
    """A code of writes from one of their keys and one of their values."""
    return HeadCode(
        key_atom=key.strongest,
        value_atom=value.strongest,
        contribution=value.code,
        values=value.atoms,
        written=key.rows[:, :, None] * value.rows[:, None],
        parameters=key.atoms.numel() + value.atoms.numel(),
        bits=key.bits + value.bits,
    )


@torch.no_grad()
def of_atoms(sae: Any, keys: Tensor, values: Tensor, active: int) -> HeadCode:
    """The code of a dictionary of rank-one matrices."""
    acts = sae.encode(LowRank.rank_one(keys, values).dense().flatten(1))
    atoms = sae.atoms()
    v = atoms.keys[:, 0]
    w = atoms.values[:, 0]
    strongest = (acts * atoms.norm()).argmax(1)
    return HeadCode(
        key_atom=strongest,
        value_atom=strongest,
        contribution=acts * (keys @ v.T) / keys.square().sum(1, keepdim=True),
        values=w,
        written=sae.decode(acts).view(len(keys), keys.shape[1], -1),
        parameters=v.numel() + w.numel(),
        bits=code_bits(len(v), active),
    )


@torch.no_grad()
def of_product(sae: Any, keys: Tensor, values: Tensor) -> HeadCode:
    """The code of a product dictionary in training, both sides in their native orientation."""
    cfg = sae.cfg
    key, value = sae.code(LowRank.rank_one(keys, values))
    sign = (key.rows * keys).sum(1, keepdim=True).sign()
    usual = torch.where(sign.mean() < 0, -1.0, 1.0)  # atoms that stand for -k and -u are turned, not their codes
    key_side = CodedSide(sign * usual * key.acts, usual * sae.key_atoms.detach(), code_bits(cfg.f_key, cfg.k_key))
    value_side = CodedSide(
        sign * usual * value.acts, usual * sae.value_atoms.detach(), code_bits(cfg.f_value, cfg.k_value)
    )
    return of_sides(key_side, value_side)
