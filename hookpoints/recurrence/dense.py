"""The recurrence of dense writes, S_t = (diag(alpha_t) + a_t b_t^T) S_{t-1} + W_t with any matrices W_t.

By linearity a state is C + Z: C has met decay alone since the block of tokens began, and Z is what erases make of it,

    C_t = diag(alpha_t) C_{t-1} + W_t,    Z_t = (diag(alpha_t) + a_t b_t^T) Z_{t-1} + a_t (b_t^T C_{t-1}),

so that Z is a recurrence of writes of low rank, which `Recurrence.scan` takes in chunks, and all that is needed of C is
what queries and erases read of it, and its end. Inside a chunk of C tokens these reads are one product of
[C, C K] and [C K, V].

Cost per token and head: about C K V multiply-adds for each vector that reads, instead of a few calls a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hookpoints.recurrence import reference
from hookpoints.recurrence.canonical import ScanResult, over_time, terms
from hookpoints.recurrence.chunked import _in_chunks, is_faster
from hookpoints.recurrence.decay import Read, decay_of

if TYPE_CHECKING:
    from hookpoints.recurrence.recurrence import Recurrence

Writes = Callable[[slice, slice], Tensor]
"""Gives the writes [B',T',H,K,V] of some rows and tokens."""

_CHUNK = 8
"""Tokens whose reads are one product: more cost arithmetic, fewer cost calls."""
_BLOCK = 256
"""Tokens after which C begins anew, since it may grow far above the state: that is what erases hold down."""
_NUMBERS = 2**20
"""Numbers in the writes of the rows and tokens of a block."""
_LOOPED = 2**22
"""The same of all rows, where tokens are looped over."""
_WIDE = {"cpu": 2**15}
"""Numbers in the states from which, by device, a loop over tokens is faster: many calls, but the least arithmetic."""


def scan_with(r: Recurrence, writes: Writes) -> ScanResult:
    """Outputs [B,T,H,V] and final state [B,H,K,V] of ``r`` with ``writes`` replacing its own. They are asked for
    block by block, so that no more than a block of them need be in memory."""
    numbers = r.H * r.K * r.V
    if is_faster(r) and r.B * numbers <= _WIDE.get(r.device.type, 2**62):
        scan_block = _write_block
        rows = max(1, _NUMBERS // (numbers * _BLOCK))
        length = _BLOCK
    else:
        scan_block = reference.scan
        rows = r.B
        length = max(1, _LOOPED // (r.B * numbers))
    results = list[ScanResult]()
    for row in range(0, r.B, rows):
        part = slice(row, row + rows)
        of_rows = r.select(rows=part).working()
        state = of_rows.starting_state()
        outputs = list[Tensor]()
        for first in range(0, r.T, length):
            tokens = slice(first, first + length)
            read, state = scan_block(of_rows.select(tokens=tokens, initial_state=state), writes(part, tokens))
            outputs.append(read)
        results.append(ScanResult(torch.cat(outputs, 1), state))
    return ScanResult(*(torch.cat(parts) for parts in zip(*results)))


def _write_block(r: Recurrence, writes: Tensor) -> ScanResult:
    outputs, back, state = _by_decay_alone(r, writes)
    if r.b is None:
        return ScanResult(outputs, state)
    assert r.a is not None
    values = back[0] if r.b.ndim == 4 else torch.stack(back, dim=3)
    # k (-beta x)^T is a x^T, and lets the erase stay along the write's key.
    if r.beta is None:
        answer = r.replace(k=r.a, u=values)
    else:
        answer = r.replace(u=-r.beta[..., None] * values)
    reads, reaction = answer.scan()
    return ScanResult(outputs + reads, state + reaction)


def _by_decay_alone(r: Recurrence, writes: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """What the layer reads of C [B,T,H,V], what each term of the erase reads of it, and its end [B,H,K,V].

    With an erase C begins at zero, since Z begins at the state.
    """
    size = min(_CHUNK, r.T)
    part = {name: _in_chunks(x, size) for name, x in over_time(r) if name in ("q", "b", "log_decay")}
    drives = _in_chunks(writes.to(r.dtype).flatten(3), size).unflatten(-1, (r.K, r.V))  # [N,n,C,K,V]
    decay = decay_of(part.get("log_decay"), part["q"])
    readers = [Read(part["q"] * r.scale, r.read_before_write)]
    if r.b is not None:
        readers += [Read(b, before=True) for b in terms(part["b"])]
    weights = _read_weights(readers, decay.edges, size, r.dtype)
    left = decay.to_end(torch.ones_like(part["q"][..., : decay.edges.shape[-1]]))
    per_head = left.shape[-1] == 1
    # By the decay alone, a chunk's end is the sum of its writes, each faded to the end.
    ends = torch.einsum("nmc,nmckv->nmkv" if per_head else "nmck,nmckv->nmkv", left.squeeze(-1), drives)
    starts = [r.starting_state().flatten(0, 1) if r.b is None else torch.zeros_like(ends[:, 0])]
    for over_chunk, end in zip(decay.over_chunk().unbind(1), ends.unbind(1)):
        starts.append(torch.addcmul(end, starts[-1], over_chunk))
    from_start = torch.cat([decay.from_start(reader) for reader in readers], dim=2)
    # Reads of the chunk's own writes, and of the state before it.
    read = weights @ drives.flatten(2, 3) + from_start @ torch.stack(starts[:-1], dim=1)
    by_reader = list[Tensor]()
    for x in read.chunk(len(readers), dim=2):  # [N,n,C,V]
        of_heads = x.flatten(1, 2)[:, : r.T].unflatten(0, (r.B, r.H))
        by_reader.append(of_heads.transpose(1, 2))
    return by_reader[0], by_reader[1:], starts[-1].unflatten(0, (r.B, r.H))


def _read_weights(readers: list[Read], edges: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """[N,n,readers C,C K]: what each vector reads of each write of its chunk. Edges: sums of log-decays."""
    unseen = torch.arange(size + 1, device=edges.device)[:, None] <= torch.arange(size, device=edges.device)
    gap = (edges[:, :, :, None] - edges[:, :, None, 1:]).to(dtype)
    # From token i to what a token finds (all rows but the last) and leaves (all but the first), [N,n,C+1,C,1 or K].
    pairs = gap.masked_fill_(unseen[..., None], -torch.inf).exp_()
    rows = list[Tensor]()
    for reader in readers:
        seen = pairs[:, :, :-1] if reader.before else pairs[:, :, 1:]
        rows.append((reader.vectors[..., None, :] * seen).flatten(3))
    return torch.cat(rows, dim=2)
