"""Fast paths, one for every rule: a walk over chunks of tokens, and the twins of the functions in `reference`.

Inside a chunk that begins with state S_0, the values that an erase feeds back solve one triangular system;
after that the recurrence is plain decayed linear attention,

    S_t = D(0->t) S_0 + sum over writes (key, value) of  sum_{i <= t} D(i->t) key_i value_i^T.

Without an erase the write is (k, u). Where beta declares a = -beta k it is (k, u~), and u~ = u - beta S^T b
follows from (I + L) u~ = u - c~^T S_0 with c = beta b and L = c^T D k. A general erase adds the write (-a, e),
e = -S^T b, from (I + L) e = -(b^T D k) u - b~^T S_0 with L = b^T D (-a). Where a token has several terms, each
counts as a write, and all erases are solved for together. After Yang et al. 2024 (arXiv 2406.06484), section 3.

Cost per token and head: about 3 K V + C (K + V) multiply-adds for chunks of C tokens. What is held besides
inputs and outputs is bounded, whatever the length, unless gradients are recorded.

The first half of this file is the walk; the second half makes outputs and states of its chunks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hookpoints.recurrence.canonical import CanonicalForm, ScanResult, over_time, tensors, terms
from hookpoints.recurrence.decay import ANCHORED, Decay, Read, decay_of, wide_dtype

_CHUNK = {"cpu": 32}
"""Tokens per chunk by device; 64 elsewhere, where launches cost more than arithmetic."""

_SPAN = {"cpu": 2**16}
"""Numbers per factor that are prepared together: on a CPU few enough that a dozen stay in the second-level cache and
that buffers in float64 are not handed back to the system each time."""

_FEW = 4
"""Up to so many tokens the plain loop is faster."""

_EXPANDED = 16
"""Tokens whose states come of one product: more cost arithmetic, fewer cost calls."""

# -- the walk


class Span(NamedTuple):
    """A stretch of tokens as n chunks of C, with all that does not depend on the state. One entry a chunk."""

    decay: Decay
    keys: list[tuple[Tensor, ...]]
    """Keys of each write, [N,C,K]."""
    left: list[tuple[Tensor, ...]]
    """The same as the chunk's end sees them, [N,K,C]."""
    values: list[tuple[Tensor, ...]]
    """Values of each write, [N,C,V]; where there are `responses`, the last are those for a zero state."""
    responses: list[tuple[Tensor, ...]]
    """[N,C,K] for as many of the last writes as come of an erase: response times the state before the chunk is to be
    taken from the values."""
    over_chunk: tuple[Tensor, ...]
    """[N,1 or K,1], what the state meets over the chunk."""
    queries: tuple[Tensor, ...]
    """[N,C,K], what reads the state before the chunk; empty if outputs are not asked for."""
    attention: list[tuple[Tensor, ...]]
    """[N,C,C] for each write: how outputs weigh its values."""


class Chunk(NamedTuple):
    """One chunk, as the walk meets it."""

    span: Span
    place: int
    """Which chunk of the span it is."""
    first: int
    """Its first token."""
    size: int
    """How many tokens it has; the rest of C is padding."""
    state: Tensor
    """[N,K,V] before it."""
    values: list[Tensor]
    """Values of each write, [N,C,V]."""
    after: Tensor
    """[N,K,V] after it."""

    @property
    def keys(self) -> list[Tensor]:
        """Keys of each write, [N,C,K]."""
        return [keys[self.place] for keys in self.span.keys]

    def outputs(self) -> Tensor:
        """What the layer reads, [N,size,V], if the walk was asked to prepare for it."""
        read = self.span.queries[self.place] @ self.state
        for weights, value in zip(self.span.attention, self.values):
            read.baddbmm_(weights[self.place], value)
        return read[:, : self.size]


def walk(r: CanonicalForm, chunk_size: int | None = None, *, reads: bool = False) -> Iterator[Chunk]:
    """Walk the chunks of `r`, which must be in its working dtype; `reads` prepares for `Chunk.outputs`."""
    size = _chunk_size(r, chunk_size)
    # All that does not depend on the state is done for many chunks in one call each. How many tokens these have is
    # bounded, so that memory does not grow with T.
    numbers = r.B * r.H * r.R * max(r.K, r.V) * size  # of a chunk
    length = max(_SPAN.get(r.device.type, 2**24) // numbers, 1) * size
    # Tokens are taken apart by split and unbind, not by slices: the backward pass of a split joins all parts once,
    # while that of each slice fills a tensor of the whole length, so that training would be quadratic in T.
    unused = ([] if reads else ["q"]) + (["a"] if r.beta is not None else [])
    parts = {n: x.split(length, dim=1) for n, x in over_time(r) if n not in unused}
    state = r.starting_state().flatten(0, 1)
    for begin in range(0, r.T, length):
        span = _prepared_chunks(r, {n: _in_chunks(part[begin // length], size) for n, part in parts.items()}, reads)
        for i, first in enumerate(range(begin, min(begin + length, r.T), size)):
            values = [value[i] for value in span.values]
            for w, response in enumerate(span.responses, start=len(values) - len(span.responses)):
                # The values were solved for a zero state; by linearity what the true state adds is one product.
                values[w] = torch.baddbmm(values[w], response[i], state, alpha=-1)
            after = state * span.over_chunk[i]
            for left, value in zip(span.left, values):
                after.baddbmm_(left[i], value)
            yield Chunk(span, i, first, min(size, r.T - first), state, values, after)
            state = after


def _prepared_chunks(r: CanonicalForm, part: dict[str, Tensor], reads: bool) -> Span:
    keys = terms(part["k"])
    values = terms(part["u"])
    back = list[Read]()
    decay = decay_of(part.get("log_decay"), keys[0])
    query = [Read(part["q"] * r.scale, r.read_before_write)] if reads else []
    if "b" in part:
        erase = part["b"] * part["beta"][..., None] if "beta" in part else part["b"]
        back = [Read(b, before=True) for b in terms(erase)]
    if back and "beta" not in part:
        keys = keys + [-a for a in terms(part["a"])]
    scores = decay.scores([*back, *query], keys)
    lags = scores[: len(back)]
    attention = scores[len(back) :]
    responses: list[Tensor] = []
    if back and "beta" in part:
        # The erase lies along the write's key, so both are one write (k, u~), and half the products are saved.
        values = _solved_terms(lags, values)
        responses = _solved_terms(lags, [decay.from_start(read) for read in back])
    elif back:
        # The first columns of the scores are what erases see of the writes k u^T, which are known and go to the right
        # side; the others are what they see of each other, which is solved for.
        lags = [row[len(values) :] for row in lags]
        seen = [sum((x @ value for x, value in zip(row, values)), torch.zeros(())) for row in scores[: len(back)]]
        values = values + _solved_terms(lags, [-x for x in seen])
        responses = _solved_terms(lags, [decay.from_start(read) for read in back])
    return Span(
        decay,
        keys=[key.unbind(1) for key in keys],
        left=[decay.to_end(key).mT.unbind(1) for key in keys],
        values=[value.unbind(1) for value in values],
        responses=[response.unbind(1) for response in responses],
        over_chunk=decay.over_chunk().unbind(1),
        queries=decay.from_start(query[0]).unbind(1) if reads else (),
        attention=[weights.unbind(1) for weights in attention[0]] if reads else [],
    )


def _chunk_size(r: CanonicalForm, requested: int | None) -> int:
    most = requested or _CHUNK.get(r.device.type, 64)
    if r.decays_per_channel:
        most = min(most, ANCHORED)
    # Chunks of even size: 33 tokens are two chunks of 17, with one token of padding instead of 31.
    return -(-r.T // -(-r.T // most))


def _in_chunks(x: Tensor, size: int) -> Tensor:
    """[B,T,H,...] as [B*H,n,size,...], ending in zeros, which neither write, erase nor decay."""
    x = x.transpose(1, 2)
    missing = -x.shape[2] % size
    if missing:
        x = F.pad(x, (0, 0) * (x.ndim - 3) + (0, missing))
    return x.reshape(x.shape[0] * x.shape[1], -1, size, *x.shape[3:])


def _solved_terms(lags: list[list[Tensor]], xs: list[Tensor]) -> list[Tensor]:
    """(I + lags)^-1 x for the terms of a token together: E x E blocks [N,n,C,C] of lags, E blocks [N,n,C,X] of x.

    Ordered by token and then by term, the matrix is triangular: the terms of one token do not see each other.
    """
    count = len(xs)
    if count == 1:
        return [_solve_triangular(lags[0][0], xs[0])]
    size = xs[0].shape[-2]
    matrix = torch.stack([torch.stack(row, dim=-1) for row in lags], dim=-3).flatten(4).flatten(2, 3)
    solved = _solve_triangular(matrix, torch.stack(xs, dim=3).flatten(2, 3))
    return list(solved.unflatten(2, (size, count)).unbind(3))


def _solve_triangular(lags: Tensor, x: Tensor) -> Tensor:
    """(I + lags)^-1 x. Solved transposed, from the right: row-major factors are then the layout LAPACK wants, and
    nothing is copied."""
    return torch.linalg.solve_triangular(lags.mT, x.mT, upper=True, unitriangular=True, left=False).mT


# -- results made of the walk


def is_faster(r: CanonicalForm) -> bool:
    """Whether chunks have an advantage over `reference`, and can be computed."""
    # Without float64 (Apple's GPUs) the anchor of per-channel decay would overflow. A decay per entry makes every value
    # channel its own head, with C K multiply-adds a token where a step has 2 K.
    return r.T > _FEW and r.rates is None and not (r.decays_per_channel and wide_dtype(r.q) != torch.float64)


def scan(r: CanonicalForm) -> ScanResult:
    """See `reference.scan`."""
    outputs = []
    state = r.starting_state()
    for chunk in walk(r.working(), reads=True):
        outputs.append(chunk.outputs())
        state = chunk.after
    return ScanResult(_by_token(outputs, r), state.reshape(r.B, r.H, r.K, r.V))


def states(r: CanonicalForm, positions: list[int]) -> Tensor:
    """See `reference.states`; `positions` must not be empty.

    One state is what the walk ends with. Otherwise sixteen tokens at a time are one batched product from the state
    before them; where no gradient is recorded it is computed in the result itself: nothing is copied, and further
    memory stays bounded.
    """
    ordered = sorted(set(positions))
    if ordered != positions:
        at = torch.tensor([bisect_left(ordered, t) for t in positions], device=r.device)
        return states(r, ordered).index_select(1, at)
    r = r.select(tokens=slice(0, ordered[-1] + 1)).working()
    if len(ordered) == 1:
        return _last_state(r).unflatten(0, (r.B, 1, r.H))
    recorded = torch.is_grad_enabled() and any(x.requires_grad for _, x in tensors(r))
    result = r.q.new_empty(0 if recorded else r.B * r.H, len(ordered), r.K, r.V)
    pieces: list[Tensor] = []
    for chunk in walk(r, _EXPANDED):
        begin = bisect_left(ordered, chunk.first)
        end = bisect_left(ordered, chunk.first + chunk.size)
        if begin < end:
            pieces.append(_states_at_rows(chunk, [t - chunk.first for t in ordered[begin:end]], result[:, begin:end]))
    return (torch.cat(pieces, dim=1) if recorded else result).unflatten(0, (r.B, r.H)).transpose(1, 2)


def _last_state(r: CanonicalForm) -> Tensor:
    """[B*H,K,V], the state after the last token."""
    state = r.starting_state().flatten(0, 1)
    for chunk in walk(r):
        state = chunk.after
    return state


def state_blocks(r: CanonicalForm) -> Iterator[Tensor]:
    """See `reference.state_blocks`; here a block is a chunk."""
    for chunk in walk(r.working(), _EXPANDED):
        states = _states_at_rows(chunk, list(range(chunk.size)), r.q.new_empty(0))
        yield states.unflatten(0, (r.B, r.H)).transpose(1, 2)


def _states_at_rows(chunk: Chunk, rows: list[int], out: Tensor) -> Tensor:
    """States [N,p,K,V] at `rows` of a chunk, a batched product: in `out` if that has their number of rows N."""
    decay = chunk.span.decay
    columns = slice(0, rows[-1] + 1)
    dense = len(rows) == rows[-1] + 1 - rows[0]  # then a slice gives views, where a list of rows would copy
    at = slice(rows[0], rows[-1] + 1) if dense else rows
    between = decay.between(chunk.place, at, columns)
    keys = _joined_pieces([key[:, None, columns] * between for key in chunk.keys], dim=2).mT
    values = _joined_pieces([value[:, columns] for value in chunk.values], dim=1)
    values = values[:, None].expand(-1, len(rows), -1, -1)
    since = decay.since[:, chunk.place, at]
    if len(out) == 0:
        begun = (chunk.state[:, None] * since).flatten(0, 1)
        added = torch.baddbmm(begun, keys.flatten(0, 1), values.flatten(0, 1))
        return added.unflatten(0, (-1, len(rows)))
    torch.mul(chunk.state[:, None], since, out=out)
    for row, key, value in zip(out, keys, values):
        row.baddbmm_(key, value)
    return out


def _joined_pieces(pieces: list[Tensor], dim: int) -> Tensor:
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat(pieces, dim)


def _by_token(pieces: list[Tensor], r: CanonicalForm) -> Tensor:
    """Pieces [B*H,C,V] of the sequence as one [B,T,H,V]."""
    return torch.cat(pieces, dim=1).unflatten(0, (r.B, r.H)).transpose(1, 2).contiguous()
