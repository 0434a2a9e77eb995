"""Edits as values: of the matrix that one head writes at one token, the plan of one run, and the changes of the writes
of a pass that realize it."""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from hookpoints.errors import EditError
from hookpoints.recurrence.canonical import CanonicalForm, Loop, is_dense

Mode = Literal["add", "replace", "delete"]


@dataclass(frozen=True, eq=False)
class WriteEdit:
    """Change what head ``head`` of layer ``layer`` writes at ``position``.

    With write ``W_t = k_t u_t^T`` (K x V, key-first) and ``E = sum_r keys[r] values[r]^T``:
    ``add`` writes ``W_t + E``, ``replace`` writes ``E``, ``delete`` writes 0. The erase of a delta rule stays the
    model's own. ``loop="closed"`` (default) lets later erases react to the edited state, which is what the model
    would really do; ``loop="open"`` holds the native corrected values fixed, so only decay acts on the difference.

    Args:
        layer: block index of a recurrent layer.
        head: head index, 0 .. H-1.
        position: token index >= 0 counted from the first token of the sequence (padding included), or None for every
            token, generated ones too.
        keys: [R,K], or [K] for rank 1. Not given for ``delete``.
        values: [R,V], or [V] for rank 1. Not given for ``delete``.
    """

    layer: int
    head: int
    position: int | None
    keys: Tensor | None = None
    values: Tensor | None = None
    mode: Mode = "add"
    loop: Loop = "closed"

    def __post_init__(self) -> None:
        if self.mode not in ("add", "replace", "delete"):
            raise EditError(f"mode must be add, replace or delete, not {self.mode!r}")
        if self.loop not in ("closed", "open"):
            raise EditError(f"loop must be closed or open, not {self.loop!r}")
        for name in ("layer", "head", "position"):
            if name != "position" or self.position is not None:
                # Whole numbers of numpy and torch become Python's; a float raises instead of being rounded.
                object.__setattr__(self, name, operator.index(getattr(self, name)))
        if self.position is not None and self.position < 0:
            raise EditError(f"position must be >= 0 or None for every token, not {self.position}")
        if self.mode == "delete":
            if self.keys is not None or self.values is not None:
                raise EditError("a delete takes no keys and values: it writes 0 (use mode='replace' to write them)")
            return
        if self.keys is None or self.values is None:
            raise EditError(f"mode {self.mode!r} needs both keys [R,K] and values [R,V]")
        for name, side in (("keys", self.keys), ("values", self.values)):
            if not is_dense(side):
                raise EditError(f"{name} must be a dense tensor of real numbers, got {type(side).__name__}")
        keys = torch.atleast_2d(self.keys)
        values = torch.atleast_2d(self.values)
        if keys.ndim != 2 or values.ndim != 2 or keys.shape[0] != values.shape[0]:
            raise EditError(
                "keys [R,K] and values [R,V] must share their rank R; "
                f"got {tuple(self.keys.shape)} and {tuple(self.values.shape)}"
            )
        object.__setattr__(self, "keys", keys)
        object.__setattr__(self, "values", values)

    def check_shape(self, heads: int, key_dim: int, value_dim: int) -> None:
        """Raise EditError unless the edit fits a layer with ``heads`` heads of ``key_dim`` x ``value_dim``."""
        if not 0 <= self.head < heads:
            raise EditError(f"head {self.head} is out of range: layer {self.layer} has heads 0 to {heads - 1}")
        for name, tensor, width in (("keys", self.keys, key_dim), ("values", self.values, value_dim)):
            if tensor is not None and tensor.shape[-1] != width:
                raise EditError(
                    f"{name} of an edit at layer {self.layer} head {self.head} must be [R,{width}] "
                    f"(states here are {key_dim} x {value_dim}, key-first), got {list(tensor.shape)}"
                )


Edits = WriteEdit | Sequence[WriteEdit]
"""One edit, or several that act together."""

EditRow = Edits
"""What one row of a batch gets."""
EditRows = WriteEdit | Sequence[EditRow]
"""What each row of a batch gets; a WriteEdit alone is one row."""


class PlacedEdit(NamedTuple):
    """An edit and the batch row that it applies to (None: all)."""

    row: int | None
    edit: WriteEdit


class EditPlan:
    """The edits of one run, by layer, with a record of which ones acted.

    Args:
        placed: the edits.
        rows: number of rows of the batch, where edits are meant for single rows.
    """

    def __init__(self, placed: Iterable[PlacedEdit], rows: int | None = None):
        self.rows = rows
        self.by_layer: dict[int, list[PlacedEdit]] = {}
        for item in placed:
            self.by_layer.setdefault(item.edit.layer, []).append(item)
        self.acted: set[int] = set()
        """Identities of those that met their token."""

    @classmethod
    def for_rows(cls, rows: EditRows) -> EditPlan:
        """Row n of the batch gets ``rows[n]``."""
        rows = as_rows(rows)
        return cls((PlacedEdit(n, edit) for n, row in enumerate(rows) for edit in as_edits(row)), len(rows))

    @classmethod
    def for_all(cls, edits: Edits) -> EditPlan:
        """Every row of the batch gets all of ``edits``."""
        return cls(PlacedEdit(None, edit) for edit in as_edits(edits))

    def all(self) -> list[WriteEdit]:
        return [placed.edit for layer in self.by_layer.values() for placed in layer]

    def factors(self) -> list[Tensor]:
        """Keys and values of all edits."""
        return [side for edit in self.all() for side in (edit.keys, edit.values) if side is not None]

    def is_finite(self) -> bool:
        """Whether keys and values of all edits are finite. Costs one look at each device that they are on."""
        by_device: dict[torch.device, list[Tensor]] = {}
        for side in self.factors():
            by_device.setdefault(side.device, []).append(side.detach().flatten())
        # Zero times anything that is not finite is NaN: few launches, and rank 0 and whole numbers are in order.
        return all(math.isfinite(torch.cat(sides).mul(0).sum()) for sides in by_device.values())

    def check_acted(self) -> None:
        """Raise EditError if an edit never met its token."""
        idle = [item.edit for layer in self.by_layer.values() for item in layer if id(item) not in self.acted]
        if idle:
            raise EditError(
                f"{len(idle)} edit(s) never acted: no pass reached position {idle[0].position} of layer {idle[0].layer}"
            )


def as_rows(rows: EditRows) -> Sequence[EditRow]:
    """Rows of edits; one edit alone is one row."""
    return [rows] if isinstance(rows, WriteEdit) else rows


def as_edits(edits: Edits) -> list[WriteEdit]:
    """One edit or several, as a list.

    Raises:
        EditError: something else than a WriteEdit.
    """
    if isinstance(edits, WriteEdit):
        return [edits]
    several: list[object] = list(edits) if isinstance(edits, Iterable) else [edits]
    if any(not isinstance(edit, WriteEdit) for edit in several):
        raise EditError(f"edits are one WriteEdit or a sequence of them, got {edits!r:.80}")
    return cast(list[WriteEdit], several)


class LowRankChange(NamedTuple):
    """Added to the writes of one head: at token t, ``keys[:, t] values[:, t]^T``, summed over terms."""

    head: int
    keys: Tensor
    """[B,T,K] or [B,T,R,K]."""
    values: Tensor
    """[B,T,V] or [B,T,R,V]."""
    loop: Loop = "closed"
    span: slice | None = None
    """Outside of these tokens nothing is added; None: that is not known."""

    def taken_away(self, where: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B,T,R,K] and values [B,T,R,V] of what undoes it at the tokens ``where`` [B,T] is true, and changes
        nothing elsewhere."""
        keys, values = (side.reshape(*where.shape, -1, side.shape[-1]) for side in (self.keys, self.values))
        gone = where[..., None, None]
        return keys * gone, -values * gone


# -- from edits at positions of batch rows to changes of the writes of a pass


def changes_of(
    plan: EditPlan,
    edits: Sequence[PlacedEdit],
    r: CanonicalForm,
    current: Sequence[LowRankChange],
    first_token: int | None,
) -> Iterator[LowRankChange]:
    """Low-rank changes that realize ``edits``, those of ``plan`` for one layer, on a pass of that layer.

    Edits of one head that do not collide share one change, so that N edits on N rows cost one pass.

    Args:
        plan: is told which edits acted.
        r: the pass, [B,T,H,...].
        current: changes already made to the writes (by hooks and by outer edits); replace and delete take those away
            as well.
        first_token: position of the first token of the pass; None where nothing tells.

    Raises:
        EditError: an edit does not fit the layer, its row or its position cannot be told, or two edits replace or
            delete the same write, in whichever loop: the second would take away what is no longer there.
    """
    if edits and plan.rows is not None and plan.rows != r.B:
        raise EditError(
            f"there are rows of edits for a batch of {plan.rows}, but the model runs {r.B} rows; give one entry "
            "(empty for none) per row that runs, beams and several returned sequences included"
        )
    stacks: dict[int, _HeadChanges] = {}
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
            if not 0 <= token < r.T:  # of another pass: a generation runs one token at a time
                continue
            at = slice(token, token + 1)
        plan.acted.add(id(placed))  # by identity: two equal edits are two
        stack = stacks.setdefault(edit.head, _HeadChanges(r, edit.head))
        stack.tokens.update(range(r.T)[at])
        rows = slice(None) if row is None else slice(row, row + 1)
        if edit.mode != "add":
            stack.remove(rows, at, edit)
        if edit.keys is not None and edit.values is not None:
            for key, value in zip(edit.keys, edit.values, strict=True):
                stack.add(rows, at, key, value, edit.loop)
    for stack in stacks.values():
        yield from stack.changes(current)


class _Slots:
    """Rank-1 terms, at most one for each token in each slot.

    Where they are is known on the host, and all are gathered at once: on a device no edit waits for another.
    """

    def __init__(self, r: CanonicalForm):
        self.r = r
        self.which: list[Tensor] = []
        """[B,T] for each slot: the number of a token's term in `terms`, from 1 on; 0 where none is."""
        self.terms: list[tuple[Tensor, Tensor]] = []

    def put(self, rows: slice, at: slice, key: Tensor, value: Tensor) -> None:
        """Put a term into the first slot that is free at these tokens."""
        free = next((which for which in self.which if not which[rows, at].any()), None)
        if free is None:
            free = torch.zeros(self.r.B, self.r.T, dtype=torch.long)
            self.which.append(free)
        self.terms.append((key, value))
        free[rows, at] = len(self.terms)

    def sides(self) -> Iterator[Tensor]:
        """Keys [B,T,S,K] and values [B,T,S,V] of S slots; 0 where no term is."""
        which = torch.stack(self.which, -1).to(self.r.device)
        for side in zip(*self.terms):
            if len({x.device for x in side}) > 1:  # vectors of one device cross at once
                side = [x.to(self.r.device) for x in side]
            vectors = torch.stack(list(side)).to(self.r.device, self.r.dtype)
            yield F.pad(vectors, (0, 0, 1, 0))[which]  # term 0 is zero


class _HeadChanges:
    """Changes of one head, packed into as few rank-1 slots per token as collisions allow."""

    def __init__(self, r: CanonicalForm, head: int):
        self.r = r
        self.head = head
        self.removed: dict[Loop, Tensor] = {}
        """[B,T] on the host, by loop; a write is removed once, in one of them."""
        self.slots: dict[Loop, _Slots] = {}
        self.tokens: set[int] = set()
        """Those with an edit: outside of them nothing is added, and nobody need look at the device to see it."""

    def remove(self, rows: slice, at: slice, edit: WriteEdit) -> None:
        if any(removed[rows, at].any() for removed in self.removed.values()):
            raise EditError(
                f"two edits replace or delete the same write (head {self.head}, position {edit.position}); keep one of "
                "them, in the closed or in the open loop"
            )
        none = torch.zeros(self.r.B, self.r.T, dtype=torch.bool)
        self.removed.setdefault(edit.loop, none)[rows, at] = True

    def add(self, rows: slice, at: slice, key: Tensor, value: Tensor, loop: Loop) -> None:
        self.slots.setdefault(loop, _Slots(self.r)).put(rows, at, key, value)

    def changes(self, current: Sequence[LowRankChange]) -> Iterator[LowRankChange]:
        """One for each loop: a pass of the recurrence answers to all of its terms."""
        terms = defaultdict[Loop, list[Iterable[Tensor]]](list)
        for loop, slots in self.slots.items():
            terms[loop].append(slots.sides())
        # A removal takes away the native write and what hooks and outer edits made of it.
        native = LowRankChange(self.head, self.r.k[:, :, self.head], self.r.u[:, :, self.head])
        written = [native, *(change for change in current if change.head == self.head)]
        for loop, on_host in self.removed.items():
            removed = on_host.to(self.r.device)
            terms[loop] += [change.taken_away(removed) for change in written]
        span = slice(min(self.tokens), max(self.tokens) + 1)
        for loop, sides in terms.items():
            keys, values = (torch.cat(terms_of_side, dim=2) for terms_of_side in zip(*sides))
            yield LowRankChange(self.head, keys, values, loop, span)
