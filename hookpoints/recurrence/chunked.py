"""Fast paths, one for every rule: twins of the functions in `hookpoints.reference`, made of `chunk_walk`."""

from __future__ import annotations

from bisect import bisect_left

import torch
from torch import Tensor

from hookpoints.recurrence import reference
from hookpoints.recurrence.checks import tensors
from hookpoints.recurrence.chunk_walk import Chunk, walk
from hookpoints.recurrence.decay import wide_dtype
from hookpoints.recurrence.recurrence import Recurrence, ScanResult

_FEW = 4
"""Up to so many tokens the plain loop is faster."""

_EXPANDED = 16
"""Tokens whose states come of one product: more cost arithmetic, fewer cost calls."""

_SUB = 8
"""Tokens whose per-channel probes come of one product."""

_FEATURES = 2048
"""Probes taken at a time, so that what they need stays in cache."""


def scan(r: Recurrence, chunk_size: int | None = None) -> ScanResult:
    """See `hookpoints.reference.scan`."""
    if _loops(r):
        return reference.scan(r)
    outputs, state = [], r.zero_state()
    for chunk in walk(r.working(), chunk_size, reads=True):
        outputs.append(chunk.outputs())
        state = chunk.after
    return ScanResult(_by_token(outputs, r), state.reshape(r.B, r.H, r.K, r.V))


def corrected_values(r: Recurrence, chunk_size: int | None = None) -> Tensor:
    """See `hookpoints.reference.corrected_values`."""
    if _loops(r):
        return reference.corrected_values(r)
    pieces = [[value[:, : chunk.size] for value in chunk.values] for chunk in walk(r.working(), chunk_size)]
    found = [_by_token(list(piece), r) for piece in zip(*pieces)]
    return torch.stack(found, dim=3) if r.k.ndim == 5 else found[0]


def states(r: Recurrence, positions: list[int], out: Tensor | None = None, chunk_size: int | None = None) -> Tensor:
    """See `hookpoints.reference.states`.

    Eight tokens at a time are one batched product from the state before them, written straight into
    the result where no gradient is recorded; memory beside the result stays bounded.
    """
    if _loops(r) or not positions:
        return reference.states(r, positions, out)
    wanted = sorted(set(positions))
    if wanted != positions:
        at = torch.tensor([bisect_left(wanted, t) for t in positions], device=r.device)
        return torch.index_select(states(r, wanted, chunk_size=chunk_size), 1, at, out=out)
    r = r.select(tokens=slice(0, wanted[-1] + 1)).working()
    result = _Filled((r.B, len(wanted), r.H, r.K, r.V), r, out)
    for chunk in walk(r, chunk_size or _EXPANDED):
        here = wanted[bisect_left(wanted, chunk.first) : bisect_left(wanted, chunk.first + chunk.size)]
        if here:
            slot = result.slot(len(here))
            # The states of one head of one sequence lie in the result as they are built.
            into = slot[:, :, 0] if slot is not None and r.B * r.H == 1 else None
            found = _states(chunk, [t - chunk.first for t in here], into)
            result.put(found.unflatten(0, (r.B, r.H)).transpose(1, 2))
    return result.joined()


def propagate(r: Recurrence, x: Tensor, start: int) -> Tensor:
    """See `hookpoints.reference.propagate`.

    Without an erase, cumulated decays. With one decay per head the vectors are the columns of a state [K,N] to
    which nothing is written. Per channel with an erase the plain loop is as fast, and is taken.
    """
    count = r.T - start - 1
    if r.a is not None and (_per_channel(r) or count <= _FEW):
        return reference.propagate(r, x, start)
    first = x[:, :, None]
    if not count:
        return first
    r = r.working().select(tokens=slice(start + 1, None), initial_state=r.zero_state())
    if r.a is None:
        return torch.cat([first, first * _cumulated(r)], dim=2)
    # What an erase writes lies along a, whatever the rule: declared so, there are no other writes.
    declared = {"k": r.a, "a": r.a, "beta": -torch.ones_like(r.a[..., 0])}
    idle = r.replace(u=x.new_zeros(*r.a.shape[:-1], x.shape[1]), initial_state=x.mT[:, None], **declared)
    return torch.cat([first, *(_columns(chunk) for chunk in walk(idle))], dim=2)


def project(r: Recurrence, v: Tensor, w: Tensor, feature_block: int | None = None) -> Tensor:
    """See `hookpoints.reference.project`.

    One decay per head: z_t = alpha_t z_{t-1} + sum over writes of (v . key_t)(w . value_t), a scalar each.
    Per channel the carried quantity is S_t w, a vector [K] each, and v is applied within 8 tokens.
    """
    if _loops(r):
        return reference.project(r, v, w)
    r = r.working()
    width = feature_block or _FEATURES
    blocks = [(a.contiguous(), b) for a, b in zip(v.mT.split(width, dim=1), w.mT.split(width, dim=1))]
    carried = [r.zero_state()[:, 0] @ some_w for _, some_w in blocks]
    if not _per_channel(r):
        carried = [(read * some_v).sum(1) for (some_v, _), read in zip(blocks, carried)]
    step = _probe_channels if _per_channel(r) else _probe_heads
    result = _Filled((r.B, r.T, len(v)), r, also=(v, w))
    for chunk in walk(r):
        probes = []
        for j, (some_v, some_w) in enumerate(blocks):
            block, carried[j] = step(chunk, some_v, some_w, carried[j])
            probes.append(block)
        result.put(torch.cat(probes, dim=2) if len(probes) > 1 else probes[0])
    return result.joined()


class _Filled:
    """A result filled along axis 1 in order: in place, or joined at the end where gradients are recorded."""

    def __init__(self, shape: tuple[int, ...], r: Recurrence, out: Tensor | None = None, also: tuple[Tensor, ...] = ()):
        inputs = [x for _, x in tensors(r)] + list(also)
        self.recorded = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        self.pieces: list[Tensor] = []
        self.count = 0
        self.out = out
        if out is None and not self.recorded:
            self.out = torch.empty(shape, dtype=r.dtype, device=r.device)

    def slot(self, count: int) -> Tensor | None:
        """Where the next `count` entries may be written; None where they must be new tensors."""
        return None if self.recorded or self.out is None else self.out[:, self.count : self.count + count]

    def put(self, piece: Tensor) -> None:
        """Add entries; those already written to their `slot` are only counted."""
        slot = self.slot(piece.shape[1])
        if slot is None:
            self.pieces.append(piece)
        elif slot.data_ptr() != piece.data_ptr():
            slot.copy_(piece)
        self.count += piece.shape[1]

    def joined(self) -> Tensor:
        """The result."""
        if self.recorded or self.out is None:
            return torch.cat(self.pieces, dim=1)
        return self.out


def _cumulated(r: Recurrence) -> Tensor:
    """Decay of the only head from before the first token on, [B,1,T,1 or K]."""
    if r.log_decay is None:
        return r.q.new_ones(r.B, 1, r.T, 1)
    total = r.log_decay[:, :, 0].to(wide_dtype(r.q)).cumsum(1).exp().to(r.dtype)
    return total.reshape(r.B, 1, r.T, -1)


def _columns(chunk: Chunk) -> Tensor:
    """States of a chunk as vectors, [B,V,size,K], for one head and one decay per head."""
    decay, tokens = chunk.span.decay, slice(0, chunk.size)
    kept = decay.since(chunk.place, 0, tokens)[:, None] * chunk.state.mT[:, :, None]
    found, between = kept.flatten(0, 1), decay.between(chunk.place, tokens, tokens)[:, None, ..., 0]
    for key, value in zip(chunk.keys, chunk.values):
        weights = between * value[:, tokens].mT[:, :, None]
        keys = key[:, None, tokens].expand(-1, value.shape[2], -1, -1)
        found.baddbmm_(weights.flatten(0, 1), keys.flatten(0, 1))
    return found.unflatten(0, kept.shape[:2])


def _states(chunk: Chunk, rows: list[int], into: Tensor | None) -> Tensor:
    """States [N,p,K,V] at `rows` of a chunk, one batched product."""
    decay, columns = chunk.span.decay, slice(0, rows[-1] + 1)
    dense = len(rows) == rows[-1] + 1 - rows[0]
    at = slice(rows[0], rows[-1] + 1) if dense else rows
    between = decay.between(chunk.place, at, columns)
    keys = torch.cat([key[:, None, columns] * between for key in chunk.keys], dim=2).flatten(0, 1)
    values = torch.cat([value[:, columns] for value in chunk.values], dim=1)[:, None]
    kept = decay.since(chunk.place, 0, at)[..., None]
    found = torch.mul(chunk.state[:, None], kept, out=into).flatten(0, 1)
    found.baddbmm_(keys.mT, values.expand(-1, len(rows), -1, -1).flatten(0, 1))
    return found.unflatten(0, (-1, len(rows)))


def _probe_heads(chunk: Chunk, v: Tensor, w: Tensor, carried: Tensor) -> tuple[Tensor, Tensor]:
    """Probes [B,size,F] by v [K,F] and w [V,F] of a chunk, and what to carry on: the last of them, [B,F]."""
    decay, tokens = chunk.span.decay, slice(0, chunk.size)
    probes = decay.since(chunk.place, 0, tokens) * carried[:, None]
    weights = decay.between(chunk.place, tokens, tokens)[..., 0]
    for key, value in zip(chunk.keys, chunk.values):
        probes.baddbmm_(weights, (key[:, tokens] @ v) * (value[:, tokens] @ w))
    return probes, probes[:, -1]


def _probe_channels(chunk: Chunk, v: Tensor, w: Tensor, carried: Tensor) -> tuple[Tensor, Tensor]:
    """Probes [B,size,F] by v [K,F] and w [V,F] of a chunk, and what to carry on: S w, [B,K,F]."""
    decay, pieces = chunk.span.decay, []
    reads = [value @ w for value in chunk.values]
    for first in range(0, chunk.size, _SUB):
        tokens = slice(first, min(first + _SUB, chunk.size))
        since = decay.since(chunk.place, first, tokens)
        between = decay.between(chunk.place, tokens, tokens)
        probes = since @ (v * carried)
        carried = carried * since[:, -1, :, None]
        for key, read in zip(chunk.keys, reads):
            reach = between * key[:, None, tokens]
            carried.baddbmm_(reach[:, -1].mT, read[:, tokens])
            for t in range(reach.shape[1]):
                seen = slice(first, first + t + 1)
                probes[:, t] += ((reach[:, t, : t + 1] @ v) * read[:, seen]).sum(1)
        pieces.append(probes)
    return torch.cat(pieces, dim=1), carried


def _loops(r: Recurrence) -> bool:
    # Without float64 the anchor of per-channel decay would overflow.
    return r.T <= _FEW or (_per_channel(r) and wide_dtype(r.q) != torch.float64)


def _per_channel(r: Recurrence) -> bool:
    return r.log_decay is not None and r.log_decay.ndim == 4


def _by_token(pieces: list[Tensor], r: Recurrence) -> Tensor:
    """Pieces [B*H,C,V] of the sequence as one [B,T,H,V]."""
    return torch.cat(pieces, dim=1).unflatten(0, (r.B, r.H)).transpose(1, 2).contiguous()
