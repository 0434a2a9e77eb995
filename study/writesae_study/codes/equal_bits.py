"""The codes that `evaluations.bits` compares, as a table: each is made for a number of steps n, and has 16 n bits at
most.

Codes are fitted to writes of mean square 1, in the metric where there is one (`HeadWrites`), and are given native ones
(`HeadWrites.native`). Alphabet: N writes, K x V their matrices, n steps of a sum, m steps of each side of a product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hookpoints import HookedRecurrent
from sae_lens_writesae import train, training_config
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae.metric import Metric
from sae_lens_writesae.sae.rows import row_orders
from writesae_study.codes.books import Code, centered, descend, of_books, pursued, residual_quantizer
from writesae_study.codes.components import fit_pca

OURS, NULL, RIVAL = "WriteSAE", "null", "residual quantizer"
"""What names of codes begin with: dictionaries of this project, what has no information, the rival that is tuned."""
BOOK = 256
"""Codes of a book: 8 bits."""
BATCH = 128
"""Writes of a step."""
LR = 3e-3


class HeadWrites:
    """Writes of one head that codes are fitted to, and what several codes of them share."""

    def __init__(
        self,
        model: HookedRecurrent,
        place: tuple[int, int],
        native: LowRank,
        metric: Metric | None,
        *,
        most: int,
        steps: int,
        seed: int,
    ):
        self.model, self.place, self.metric = model, place, metric
        self.steps, self.seed = steps, seed
        self.K = native.keys.shape[-1]
        self.V = native.values.shape[-1]
        x = metric.move(native) if metric else native
        # So that one learning rate serves every head, whatever the size of its writes.
        self.scale = (self.K * self.V) ** 0.5 / float(x.norm().mean())
        self.x = x * self.scale
        self.books = residual_quantizer(self.x, BOOK, most, seed)
        """One for each of `most` steps."""
        self.components = fit_pca(self.x, 2 * most)
        # k u^T is the same for (k / c) (c u)^T: a code of one side needs a choice of c.
        size = self.x.keys.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        self.sides = _column_matrices(self.x.keys / size), _column_matrices(self.x.values * size)
        """Keys of norm 1, and the values that belong to them."""
        self.axes = [torch.linalg.svd(side.keys[:, 0], full_matrices=False)[2] for side in self.sides]
        """Singular vectors of either, [K,K] and [V,V]."""

    def matrices(self, rows: Tensor) -> Tensor:
        """[N,K,V] of rows [N,K*V]."""
        return rows.view(-1, self.K, self.V)

    def native(self, code: Code) -> Code:
        """The code, right on average, as one of native writes."""
        code = centered(code, self.x)
        metric = self.metric

        def of_native(native: LowRank) -> Tensor:
            moved = metric.move(native) if metric else native
            written = code.written(moved * self.scale) / self.scale
            return metric.inverse.apply_rows(written.flatten(1)).view_as(written) if metric else written

        return code._replace(written=of_native)


def _column_matrices(side: Tensor) -> LowRank:
    """One side of N writes [N,1,D] as matrices of one column."""
    return LowRank(side, side.new_ones(len(side), 1, 1))


# ------------------------------------------------------------------------------------------------ the codes


def n_atoms(n: int) -> int:
    """Atoms of which n, in any order, can be chosen in 256^n ways: (atoms + n - 1 over n) is about 2^(8 n)."""
    return int(BOOK * math.factorial(n) ** (1 / n)) - n + 1


def topk(writes: HeadWrites, n: int) -> Code:
    """A dictionary with n active atoms."""
    cfg = training_config(
        writes.model,
        *writes.place,
        d_sae=n_atoms(n),
        sae={"k": n},
        training_tokens=BATCH * writes.steps,
        seed=writes.seed,
        context_size=8,
        verbose=False,
    )
    with torch.enable_grad():
        sae = train(cfg, writes.x)
    sae.settle_b_dec()
    return Code(
        name=f"{OURS} TopK {n}",
        bits=16.0 * n,
        written=lambda x: writes.matrices(sae(x.dense().flatten(1))),
        parameters=list(sae.parameters()),
    )


def quantizer(writes: HeadWrites, n: int) -> Code:
    """Residual: n steps, each with its own book."""
    # Copies: each code is tuned by itself.
    books = [LowRank(book.keys.clone(), book.values.clone()) for book in writes.books[:n]]
    return of_books(f"{RIVAL} {n}", 16.0 * n, books)


def untrained(writes: HeadWrites, n: int) -> Code:
    """Atoms that nothing was fitted to."""
    noise = writes.x.rows(slice(BOOK)).random_like(torch.Generator().manual_seed(writes.seed))
    return of_books(f"{NULL}: untrained atoms", 16.0 * n, [noise] * n)


def another_write(writes: HeadWrites, n: int) -> Code:
    """What the quantizer has for another write."""
    return Code(
        name=f"{NULL}: code of another write",
        bits=16.0 * n,
        written=lambda x: pursued(x, writes.books[:n]).dense().roll(len(x) // 2, 0),  # half a batch away
        parameters=[],
    )


def components(writes: HeadWrites, n: int) -> Code:
    """The first 2 n principal components."""
    return Code(
        name=f"components of writes {2 * n}",
        bits=16.0 * n,
        written=lambda x: writes.matrices(writes.components.project(x.dense().flatten(1), 2 * n)),
        parameters=[*writes.components],
    )


def components_of_sides(writes: HeadWrites, n: int) -> Code:
    """The first n singular vectors of keys and of values."""
    of_keys, of_values = writes.axes
    k = of_keys[:n].T @ of_keys[:n]
    u = of_values[:n].T @ of_values[:n]
    return Code(
        name=f"components of k and of u {n} x {n}",
        bits=16.0 * n,
        written=lambda x: k @ x.dense() @ u,
        parameters=writes.axes,
    )


def pursuit(writes: HeadWrites, n: int) -> Code | None:
    """A dictionary whose n atoms are taken one after the other. One atom is what `topk` has."""
    if n == 1:
        return None
    atoms = residual_quantizer(writes.x, n_atoms(n), 1, writes.seed) * n  # one book for all steps
    code = of_books(f"{OURS} pursuit {n}", 16.0 * n, atoms, positive=True)

    def loss(numbers: Tensor) -> Tensor:
        x = writes.x.rows(numbers)
        left = LowRank.cat([x, pursued(x, atoms, positive=True) * -1.0])
        return left.inner(left).mean() / (writes.K * writes.V)

    descend(code.parameters, loss, row_orders(len(writes.x), BATCH, writes.seed), writes.steps, LR)
    return code


def product_quantizer(writes: HeadWrites, n: int) -> Code | None:
    """Quantizers of keys and of values, with m steps each and one coefficient that both share."""
    m = (16 * n + 8) // 32  # the largest with 32 m - 8 <= 16 n: 2 m steps of 16 bits, less the coefficient shared
    if m == 0:
        return None
    keys, values = writes.sides
    key_books = residual_quantizer(keys, BOOK, m, writes.seed)
    value_books = residual_quantizer(values, BOOK, m, writes.seed)

    def written(x: LowRank) -> Tensor:
        k = pursued(_column_matrices(x.keys), key_books).dense()
        u = pursued(_column_matrices(x.values), value_books).dense()
        return k @ u.mT

    return Code(
        name=f"product quantizer {m} x {m}",
        bits=32.0 * m - 8,
        written=written,
        parameters=[book.keys for book in key_books + value_books],
    )


CODES: tuple[Callable[[HeadWrites, int], Code | None], ...] = (
    topk,
    quantizer,
    untrained,
    another_write,
    components,
    components_of_sides,
    pursuit,
    product_quantizer,
)
"""In the order of the tables."""


def codes(writes: HeadWrites, budget: int) -> Iterator[Code]:
    """Every code of native writes that has at most `budget` bits."""
    for make in CODES:
        code = make(writes, budget // 16)
        if code is not None:
            yield writes.native(code)
