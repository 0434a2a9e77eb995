"""Token-by-token recurrence without cleverness: the oracle of every fast path.

Each function here has a twin of the same name and arguments in `chunked`. The loop holds one state; only what is
returned is stored. Cost O(K V) per token and head, plus a handful of kernel launches per token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hookpoints.recurrence.canonical import CanonicalForm, ScanResult


def read_out(x: Tensor, state: Tensor) -> Tensor:
    """S^T x for x [B,H,(R,)K] and a state [B,H,K,V]: [B,H,(R,)V]."""
    if x.ndim == state.ndim:
        return x @ state
    return (x[..., None, :] @ state)[..., 0, :]


def add_write(state: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """S + sum of key value^T over the terms of keys [B,H,(R,)K] and values [B,H,(R,)V]."""
    several = keys.ndim == state.ndim
    if several:
        return state + keys.mT @ values
    return torch.addcmul(state, keys[..., None], values[..., None, :])


def transition(r: CanonicalForm, t: int, state: Tensor) -> Tensor:
    """(diag(alpha_t) + a_t b_t^T) S for a state [B,H,K,V]; with `rates` each entry times its own decay."""
    moved = state
    if r.rates is not None and r.log_decay is not None:
        return state * (r.log_decay[:, t, :, None] * r.rates).exp()
    if r.log_decay is not None:
        decay = r.log_decay[:, t].exp()
        moved = state * (decay[..., None, None] if decay.ndim == 2 else decay[..., None])
    if r.a is not None and r.b is not None:
        # The erase reads the state before the decay; rules that erase after it have the decay in b.
        moved = add_write(moved, r.a[:, t], read_out(r.b[:, t], state))
    return moved


def steps(r: CanonicalForm, writes: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Walk the tokens: states [B,H,K,V] before and after each one's write. `r` must be in its working dtype
    (`CanonicalForm.working`). `writes` [B,T,H,K,V] replace its own."""
    state = r.starting_state()
    for t in range(r.T):
        moved = transition(r, t, state)
        after = add_write(moved, r.k[:, t], r.u[:, t]) if writes is None else moved + writes[:, t]
        yield state, after
        state = after


def scan(r: CanonicalForm, writes: Tensor | None = None) -> ScanResult:
    """Outputs [B,T,H,V] and final state; `writes` as for `steps`."""
    r = r.working()
    outputs = []
    state = r.starting_state()
    if r.T == 0:
        return ScanResult(state.new_zeros(r.B, 0, r.H, r.V), state)
    for t, (before, state) in enumerate(steps(r, writes)):
        outputs.append(read_out(r.q[:, t] * r.scale, before if r.read_before_write else state))
    return ScanResult(torch.stack(outputs, dim=1), state)


def states(r: CanonicalForm, positions: list[int]) -> Tensor:
    """States after the write at `positions`, [B,T',H,K,V]."""
    if not positions:
        return r.starting_state()[:, None][:, :0]
    requested = set(positions)  # held are these alone: all states would be T K V numbers a head
    state_after = {t: after for t, (_, after) in enumerate(steps(r.working())) if t in requested}
    return torch.stack([state_after[t] for t in positions], dim=1)


def state_blocks(r: CanonicalForm) -> Iterator[Tensor]:
    """States after each write, [B,1,H,K,V] at a time."""
    for _, after in steps(r.working()):
        yield after[:, None]
