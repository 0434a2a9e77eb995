"""How a layer answers to a change of its writes, states or reads: what is added to its outputs and its last state.

A recurrence is linear in its writes, so the answer to a change is the same recurrence run on the change alone from a
zero state, and outputs are ``native + response``: the native kernel stays untouched and no change adds exactly nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from hookpoints.edits.edit import LowRankChange
from hookpoints.recurrence.canonical import over_time
from hookpoints.recurrence.recurrence import Recurrence
from hookpoints.recurrence.reference import transition
from hookpoints.rules.base import OpResult


class EditResponse:
    """Collects what changes add to one layer's outputs [B,T,H,V] and final state [B,H,K,V].

    Nothing is allocated until something changes, so an unchanged layer returns its native tensors untouched.
    """

    def __init__(self, recurrence: Recurrence):
        self.recurrence = recurrence
        self.low_rank: list[LowRankChange] = []
        self._dense: list[tuple[slice, Tensor]] = []
        self.outputs: Tensor | None = None
        self.final_state: Tensor | None = None

    def add_low_rank(self, change: LowRankChange) -> None:
        """Cost: one chunked pass over one head, from the first changed token on."""
        span = _span(change.size(), change.keys, change.values)
        if span is None:
            return
        self.low_rank.append(change)
        head = self.recurrence.select(heads=slice(change.head, change.head + 1))
        answer = head.with_write(change.keys.unsqueeze(2), change.values.unsqueeze(2), loop=change.loop)
        if span.start:
            answer = answer.select(tokens=slice(span.start, None), initial_state=answer.starting_state())
        outputs, final_state = answer.scan()
        self._add(slice(change.head, change.head + 1), span.start, outputs, final_state)

    def add_dense(self, heads: slice, change: Tensor) -> None:
        """``change`` [B,T,H',K,V] is added to the writes of ``heads``.

        Cost O(K V) per token and head, one step per token while writes change: a matrix per token has no shorter form.
        """
        span = _span(change.abs().amax((-1, -2, -3)), change)
        if span is None:
            return
        self._dense.append((heads, change))
        head = self.recurrence.select(heads=heads).replace(initial_state=None)
        span_head = head.select(tokens=span, initial_state=head.starting_state())
        outputs, state = _dense(span_head, change[:, span]).scan(method="reference")
        self._add(heads, span.start, outputs, state if span.stop == head.T else None)
        if span.stop < head.T:  # no more changes: the rest is carried by the chunked pass
            rest = head.with_write(head.k, torch.zeros_like(head.u))
            rest = rest.select(tokens=slice(span.stop, None), initial_state=state)
            self._add(heads, span.stop, *rest.scan())

    def add_states_before(self, heads: slice, change: Tensor) -> None:
        """``change`` [B,T,H',K,V] is added to the states that tokens find, S_{t-1}, and goes on from there: what the
        transition of token t makes of it is a write at t, (diag(alpha_t) + a_t b_t^T) change_t. Cost: as for writes."""
        span = _span(change.abs().amax((-1, -2, -3)), change)
        if span is None:
            return
        r = self.recurrence.select(heads=heads).working()
        if r.read_before_write:
            self._add_reads(r, heads, change)
        found = r.select(tokens=span, initial_state=r.starting_state())
        each = {name: x.flatten(0, 1).unsqueeze(1) for name, x in over_time(found)}
        alone = dataclasses.replace(found, **each, initial_state=None)  # every token a row of its own
        writes = torch.zeros_like(change)
        writes[:, span] = transition(alone, 0, change[:, span].flatten(0, 1)).unflatten(0, (r.B, -1))
        self.add_dense(heads, writes)

    def add_states(self, heads: slice, change: Tensor) -> None:
        """``change`` [B,T,H',K,V] is added to the states that reads see; the last one goes on. Not propagated."""
        if _span(change.abs().amax((-1, -2, -3)), change) is None:
            return
        selected = self.recurrence.select(heads=heads)
        seen = change
        if selected.read_before_write:
            seen = torch.cat([torch.zeros_like(change[:, :1]), change[:, :-1]], dim=1)
        self._add_reads(selected, heads, seen, change[:, -1])

    def writes(self, heads: slice) -> Tensor:
        """Dense writes [B,T,H',K,V] of ``heads``, changes so far included."""
        return self._plus_changes(self.recurrence.write(heads=heads), heads, lambda _, change: change.dense())

    def states(self, heads: slice) -> Tensor:
        """Dense states [B,T,H',K,V] of ``heads`` after each write, changes so far included."""

        def answer(r: Recurrence, change: LowRankChange) -> Tensor:
            moved = r.with_write(change.keys.unsqueeze(2), change.values.unsqueeze(2), loop=change.loop)
            return moved.states()[:, :, 0]

        states = self._plus_changes(self.recurrence.states(heads=heads), heads, answer)
        wanted = range(self.recurrence.H)[heads]
        for where, change in self._dense:
            selected = self.recurrence.select(heads=where).replace(initial_state=None)
            for i, head in enumerate(range(self.recurrence.H)[where]):
                if head in wanted:
                    one = slice(i, i + 1)
                    moved = _dense(selected.select(heads=one), change[:, :, one]).states(method="reference")
                    states[:, :, head - wanted.start] += moved[:, :, 0]
        return states

    def states_before(self, heads: slice) -> Tensor:
        """Dense states [B,T,H',K,V] that the tokens of ``heads`` find, changes so far included."""
        first = self.recurrence.select(heads=heads).starting_state().unsqueeze(1)
        return torch.cat([first, self.states(heads)[:, :-1]], dim=1)

    def apply(self, native: OpResult) -> OpResult:
        """What the layer gets: the native result itself where nothing changed, else the sum in the native dtypes."""
        if self.outputs is None or self.final_state is None:
            return native
        outputs = (native.outputs.to(self.outputs.dtype) + self.outputs).to(native.outputs.dtype)
        state = native.final_state
        return OpResult(outputs, None if state is None else (state + self.final_state).to(state.dtype))

    def _plus_changes(
        self, base: Tensor, heads: slice, answer: Callable[[Recurrence, LowRankChange], Tensor]
    ) -> Tensor:
        wanted = range(self.recurrence.H)[heads]
        changes = [change for change in self.low_rank if change.head in wanted]
        if changes and base.requires_grad:
            base = base.clone()
        for change in changes:
            one = self.recurrence.select(heads=slice(change.head, change.head + 1))
            base[:, :, change.head - wanted.start] += answer(one, change)
        return base

    def _add_reads(self, r: Recurrence, heads: slice, seen: Tensor, final_state: Tensor | None = None) -> None:
        """What ``r``, which is that of ``heads``, reads of ``seen`` [B,T,H',K,V] is added to the outputs."""
        self._add(heads, 0, torch.einsum("bthkv,bthk->bthv", seen, r.scale * r.q.to(seen.dtype)), final_state)

    def _add(self, heads: slice, start: int, outputs: Tensor, final_state: Tensor | None) -> None:
        r = self.recurrence
        if self.outputs is None or self.final_state is None:
            self.outputs = torch.zeros(r.B, r.T, r.H, r.V, dtype=r.dtype, device=r.device)
            self.final_state = torch.zeros(r.B, r.H, r.K, r.V, dtype=r.dtype, device=r.device)
        if outputs.requires_grad or self.outputs.requires_grad:  # in-place adds would break earlier graphs
            self.outputs, self.final_state = self.outputs.clone(), self.final_state.clone()
        self.outputs[:, start : start + outputs.shape[1], heads] += outputs
        if final_state is not None:
            self.final_state[:, heads] += final_state


def _span(size: Tensor, *sources: Tensor) -> slice | None:
    """Tokens where ``size`` [B,T] is not zero; all of them where a gradient may be asked for; None where none is."""
    if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
        return slice(0, size.shape[1])
    changed = (size != 0).any(0).nonzero()
    return slice(int(changed[0]), int(changed[-1]) + 1) if len(changed) else None


def _dense(r: Recurrence, writes: Tensor) -> Recurrence:
    """The response to writes [B,T,H,K,V] of full rank: K terms a token, one for each row."""
    rows = torch.eye(r.K, dtype=r.dtype, device=r.device).expand(*writes.shape[:3], -1, -1)
    return r.with_write(rows, writes)
