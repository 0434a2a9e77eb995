"""Turns edits at positions of batch rows into changes of the writes of a pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hookpoints.edits.edit import EditPlan, LowRankChange, PlacedEdit
from hookpoints.errors import EditError
from hookpoints.recurrence.recurrence import Loop, Recurrence


def changes_of(
    plan: EditPlan,
    edits: Sequence[PlacedEdit],
    r: Recurrence,
    current: Sequence[LowRankChange],
    first_token: int | None,
) -> Iterator[LowRankChange]:
    """Low-rank changes that realise ``edits``, those of ``plan`` for one layer, on a pass of that layer.

    Edits of one head that do not collide share one change, so that N edits on N rows cost one pass.

    Args:
        plan: is told which edits acted.
        r: the pass, [B,T,H,...].
        current: changes already made to the writes (by hooks and by outer edits); replace and delete take those away
            as well.
        first_token: position of the first token of the pass; None where nothing tells.

    Raises:
        EditError: an edit does not fit the layer, its row or its position cannot be told, or two edits replace or
            delete the same write.
    """
    if edits and plan.rows is not None and plan.rows != r.B:
        raise EditError(
            f"there are rows of edits for a batch of {plan.rows}, but the model runs {r.B} rows; give one entry "
            "(empty for none) per row that runs, beams and several returned sequences included"
        )
    stacks: dict[tuple[int, Loop], _HeadChanges] = {}
    for placed in edits:
        row, edit = placed
        edit.check_shape(r.H, r.K, r.V)
        at = slice(None)
        if edit.position is not None:
            if first_token is None:
                raise EditError(
                    f"layer {edit.layer} cannot tell at which position it continues this cache, so edits with a "
                    "position cannot be placed: fill the cache with this model, or run the whole sequence"
                )
            token = edit.position - first_token
            if not 0 <= token < r.T:
                continue
            at = slice(token, token + 1)
        plan.note(placed)
        stack = stacks.setdefault((edit.head, edit.loop), _HeadChanges(r, edit.head, edit.loop))
        rows = slice(None) if row is None else slice(row, row + 1)
        if edit.mode != "add":
            stack.remove(rows, at, edit.position)
        if edit.keys is not None and edit.values is not None:
            for key, value in zip(edit.keys, edit.values, strict=True):
                stack.add(rows, at, key, value)
    for stack in stacks.values():
        yield from stack.changes(current)


class _HeadChanges:
    """Changes of one head, packed into as few rank-1 slots per token as collisions allow."""

    def __init__(self, r: Recurrence, head: int, loop: Loop):
        self.r, self.head = r, head
        self.loop: Loop = loop
        self.removed = torch.zeros(r.B, r.T, dtype=torch.bool, device=r.device)
        self.slots: list[tuple[Tensor, Tensor, Tensor]] = []  # keys [B,T,K], values [B,T,V], taken [B,T]

    def remove(self, rows: slice, at: slice, position: int | None) -> None:
        if self.removed[rows, at].any():
            raise EditError(
                f"two edits replace or delete the same write (head {self.head}, position {position}); keep one of them"
            )
        self.removed[rows, at] = True

    def add(self, rows: slice, at: slice, key: Tensor, value: Tensor) -> None:
        free = (slot for slot in self.slots if not slot[2][rows, at].any())
        keys, values, taken = next(free, None) or self._new_slot()
        keys[rows, at] = key.to(keys)
        values[rows, at] = value.to(values)
        taken[rows, at] = True

    def _new_slot(self) -> tuple[Tensor, Tensor, Tensor]:
        r = self.r
        keys = r.k.new_zeros(r.B, r.T, r.K, dtype=r.dtype)
        values = r.k.new_zeros(r.B, r.T, r.V, dtype=r.dtype)
        self.slots.append((keys, values, torch.zeros_like(self.removed)))
        return self.slots[-1]

    def changes(self, current: Sequence[LowRankChange]) -> Iterator[LowRankChange]:
        for keys, values, _ in self.slots:
            yield LowRankChange(self.head, keys, values, self.loop)
        if self.removed.any():
            native = LowRankChange(self.head, self.r.k[:, :, self.head], self.r.u[:, :, self.head])
            for change in (native, *(change for change in current if change.head == self.head)):
                yield change.taken_away(self.removed, self.loop)
