"""How a layer answers to a change of its writes, states or reads: what is added to its outputs and its last state.

A recurrence is linear in its writes, so the answer to a change is the same recurrence run on the change alone from a
zero state, and outputs are ``native + response``: the native kernel stays untouched and no change adds exactly nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from hookpoints.edits.edit import LowRankChange
from hookpoints.recurrence import dense
from hookpoints.recurrence.canonical import over_time
from hookpoints.recurrence.recurrence import Recurrence
from hookpoints.recurrence.reference import transition
from hookpoints.rules.base import OpResult

_TERMS = 8
"""Terms of a token's change from which it is cheaper as a matrix."""


class EditResponse:
    """Collects what changes add to one layer's outputs [B,T,H,V] and final state [B,H,K,V].

    Nothing is allocated until something changes, so an unchanged layer returns its native tensors untouched.
    """

    def __init__(self, recurrence: Recurrence):
        self.recurrence = recurrence
        self.low_rank: list[LowRankChange] = []
        self.outputs: Tensor | None = None
        self.final_state: Tensor | None = None

    def add_low_rank(self, change: LowRankChange) -> None:
        """Cost: one chunked pass over one head, from the first token of its span on. Many terms are added up at these
        tokens, and are dense there."""
        self.low_rank.append(change)
        span = change.span or slice(0, self.recurrence.T)
        self._add_answer(slice(change.head, change.head + 1), self._answering_recurrence(change), span)

    def add_of_heads(self, keys: Tensor, values: Tensor) -> None:
        """A change of the writes of all heads, keys [B,T,H,K] or [B,T,H,R,K] and values likewise. Cost: a look at the
        device for all heads, then as `add_low_rank` for each head that changes. Of one token on a device there is no
        look, and all heads are one pass."""
        changes = [LowRankChange(head, keys[:, :, head], values[:, :, head]) for head in range(keys.shape[2])]
        if _is_unseen(keys):
            self.low_rank += changes
            self._add_answer(slice(None), self.recurrence.with_write(keys, values), slice(0, 1))
            return
        terms = keys.abs().amax(-1) * values.abs().amax(-1)
        changed = (terms != 0).any(0, keepdim=True).cpu()
        for change in changes:
            of_head = changed[:, :, change.head].reshape(1, self.recurrence.T, -1).any(-1)
            span = _changed_tokens(of_head, keys, values)
            if span is not None:
                self.add_low_rank(change._replace(span=span))

    def _add_answer(self, heads: slice, answer: Recurrence, span: slice) -> None:
        """What ``answer``, that of ``heads`` to a change at the tokens ``span``, gives is added."""
        if answer.R > _TERMS:
            keys = answer.k[:, span]
            values = answer.u[:, span]
            self._add_writes(heads, answer, span, lambda rows, at: keys[rows, at].mT @ values[rows, at])
            return
        if span.start:
            answer = answer.select(tokens=slice(span.start, None), initial_state=answer.starting_state())
        outputs, final_state = answer.scan()
        self._add_outputs(heads, span.start, outputs, final_state)

    def add_dense(self, heads: slice, change: Tensor) -> None:
        """``change`` [B,T,H',K,V] is added to the writes of ``heads``.

        Cost: see `hookpoints.recurrence.dense`; from the last change on, that of a chunked pass.
        """
        span = _changed_tokens(_change_size(change), change)
        if span is None:
            return
        # Also kept as K terms of rank 1, for hooks that ask later what the writes have become.
        eye = torch.eye(change.shape[-2], dtype=change.dtype, device=change.device)
        keys = eye.expand(*change.shape[:2], -1, -1)
        for i, head in enumerate(range(self.recurrence.H)[heads]):
            self.low_rank.append(LowRankChange(head, keys, change[:, :, i]))
        r = self.recurrence.select(heads=heads).replace(initial_state=None)
        changed = change[:, span]
        self._add_writes(heads, r, span, lambda rows, at: changed[rows, at])

    def _add_writes(self, heads: slice, r: Recurrence, span: slice, writes: dense.Writes) -> None:
        """What ``r``, that of ``heads``, makes of ``writes`` at the tokens ``span`` is added."""
        changed = dense.scan_with(r.select(tokens=span, initial_state=r.starting_state()), writes)
        if span.stop == r.T:
            self._add_outputs(heads, span.start, changed.outputs, changed.final_state)
            return
        self._add_outputs(heads, span.start, changed.outputs, None)
        # No more changes: the rest is carried by the chunked pass.
        nothing = torch.zeros_like(r.q[..., :1]).expand(*r.q.shape[:3], r.V)
        rest = r.with_write(r.q, nothing)
        rest = rest.select(tokens=slice(span.stop, None), initial_state=changed.final_state)
        self._add_outputs(heads, span.stop, *rest.scan())

    def add_states_before(self, heads: slice, change: Tensor) -> None:
        """``change`` [B,T,H',K,V] is added to the states that tokens find, S_{t-1}, and is carried on: what the
        transition of token t makes of it is a write at t, (diag(alpha_t) + a_t b_t^T) change_t. Cost: as for writes."""
        span = _changed_tokens(_change_size(change), change)
        if span is None:
            return
        r = self.recurrence.select(heads=heads).working()
        if r.read_before_write:  # the token itself reads what it finds
            self._add_reads(r, heads, change)
        changed = r.select(tokens=span, initial_state=r.starting_state())
        by_token = {name: x.flatten(0, 1).unsqueeze(1) for name, x in over_time(changed)}
        alone = dataclasses.replace(changed, **by_token, initial_state=None)  # every token its own row
        moved = transition(alone, 0, change[:, span].flatten(0, 1))
        writes = torch.zeros_like(change)
        writes[:, span] = moved.unflatten(0, (r.B, -1))
        self.add_dense(heads, writes)

    def add_states(self, heads: slice, change: Tensor) -> None:
        """``change`` [B,T,H',K,V] is added to the states that reads see; the last one is carried on. Not propagated."""
        if _changed_tokens(_change_size(change), change) is None:
            return
        selected = self.recurrence.select(heads=heads)
        seen = F.pad(change, (0, 0, 0, 0, 0, 0, 1, -1)) if selected.read_before_write else change
        self._add_reads(selected, heads, seen, change[:, -1])

    def writes(self, heads: slice) -> Tensor:
        """Dense writes [B,T,H',K,V] of ``heads``, changes so far included."""
        return self._plus_changes(self.recurrence.write(heads=heads), heads, Recurrence.write)

    def states(self, heads: slice) -> Tensor:
        """Dense states [B,T,H',K,V] of ``heads`` after each write, changes so far included."""

        def of_one(r: Recurrence) -> Tensor:
            return r.states(method="reference" if r.R > _TERMS else "chunked")

        return self._plus_changes(self.recurrence.states(heads=heads), heads, of_one)

    def states_before(self, heads: slice) -> Tensor:
        """Dense states [B,T,H',K,V] that the tokens of ``heads`` find, changes so far included."""
        return torch.cat([self.recurrence.starting_state()[:, None, heads], self.states(heads)[:, :-1]], dim=1)

    def apply(self, native: OpResult) -> OpResult:
        """What the layer gets: the native result itself where nothing changed, else the sum in the native dtypes."""
        if self.outputs is None or self.final_state is None:
            return native
        outputs = (native.outputs.to(self.outputs.dtype) + self.outputs).to(native.outputs.dtype)
        state = native.final_state
        return OpResult(outputs, None if state is None else (state + self.final_state).to(state.dtype))

    def _answering_recurrence(self, change: LowRankChange) -> Recurrence:
        """The recurrence of one head that makes ``change`` alone, from a zero state."""
        head = self.recurrence.select(heads=slice(change.head, change.head + 1))
        return head.with_write(change.keys.unsqueeze(2), change.values.unsqueeze(2), loop=change.loop)

    def _plus_changes(self, base: Tensor, heads: slice, of_one: Callable[[Recurrence], Tensor]) -> Tensor:
        """``base`` of ``heads``, and what ``of_one`` [B,T,1,K,V] makes of each change of theirs."""
        selected = range(self.recurrence.H)[heads]
        changes = [change for change in self.low_rank if change.head in selected]
        if changes and base.requires_grad:  # autograd may need the values that are changed in place below
            base = base.clone()
        for change in changes:
            base[:, :, change.head - selected.start] += of_one(self._answering_recurrence(change))[:, :, 0]
        return base

    def _add_reads(self, r: Recurrence, heads: slice, seen: Tensor, final_state: Tensor | None = None) -> None:
        """What ``r``, which is that of ``heads``, reads of ``seen`` [B,T,H',K,V] is added to the outputs."""
        self._add_outputs(heads, 0, torch.einsum("bthkv,bthk->bthv", seen, r.scale * r.q.to(seen.dtype)), final_state)

    def _add_outputs(self, heads: slice, start: int, outputs: Tensor, final_state: Tensor | None) -> None:
        r = self.recurrence
        if self.outputs is None or self.final_state is None:
            self.outputs = torch.zeros(r.B, r.T, r.H, r.V, dtype=r.dtype, device=r.device)
            self.final_state = torch.zeros(r.B, r.H, r.K, r.V, dtype=r.dtype, device=r.device)
        if outputs.requires_grad or self.outputs.requires_grad:  # in-place adds would break earlier graphs
            self.outputs = self.outputs.clone()
            self.final_state = self.final_state.clone()
        self.outputs[:, start : start + outputs.shape[1], heads] += outputs
        if final_state is not None:
            self.final_state[:, heads] += final_state


def _changed_tokens(size: Tensor, *sources: Tensor) -> slice | None:
    """Tokens where ``size`` [B,T] is not zero; all of them where a gradient may be asked for; None where none is."""
    if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
        return slice(0, size.shape[1])
    if _is_unseen(size):
        return slice(0, 1)
    changed = (size != 0).any(0).cpu().nonzero()  # one look at the device
    if len(changed):
        return slice(int(changed[0]), int(changed[-1]) + 1)
    return None


def _is_unseen(change: Tensor) -> bool:
    """Whether a change [B,T,...] is of one token on a device: it is answered without a look, for which the host would
    wait at each generated token. The answer to nothing is zero."""
    return change.shape[1] == 1 and change.device.type != "cpu"


def _change_size(change: Tensor) -> Tensor:
    """[B,T], zero exactly where ``change`` [B,T,H,K,V] is."""
    return torch.linalg.vector_norm(change, torch.inf, dim=(-1, -2, -3))
