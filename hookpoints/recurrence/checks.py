"""Checks of a recurrence's fields and of the indices its methods take: each error says what was asked, found
and expected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hookpoints.recurrence.recurrence import Recurrence

Index = int | slice | Sequence[int] | Tensor | None
"""What chooses rows, heads or positions."""

TIME_FIELDS = ("q", "k", "u", "log_decay", "a", "b", "beta")
"""Fields with a time axis."""


def resolve_index(index: Index, size: int, what: str) -> list[int]:
    """The positions that an int, slice, sequence or integer tensor chooses on an axis of `size`; IndexError
    beyond it."""
    if index is None or isinstance(index, slice):
        return list(range(size))[index or slice(None)]
    if isinstance(index, Tensor):
        index = index.reshape(-1).tolist()
    chosen = [index] if isinstance(index, int) else [int(i) for i in index]
    for i in chosen:
        if not -size <= i < size:
            raise IndexError(f"{what} {i} is out of range for {size}")
    return [i % size for i in chosen]


def resolve_one(index: int, size: int, what: str) -> int:
    """One position, counted from 0; IndexError beyond the axis."""
    return resolve_index(int(index), size, what)[0]


def pick(x: Tensor, index: Index, dim: int, what: str) -> Tensor:
    """Choose along `dim`, which stays even for one; a view for a slice or one index."""
    if index is None:
        return x
    if isinstance(index, slice):
        return x[(slice(None),) * dim + (index,)]
    chosen = resolve_index(index, x.shape[dim], what)
    if len(chosen) == 1:
        return x.narrow(dim, chosen[0], 1)
    return x.index_select(dim, torch.tensor(chosen, dtype=torch.long, device=x.device))


def choice(key: str, choices: dict[str, Any], what: str) -> Any:
    """`choices[key]`; ValueError that lists the choices otherwise."""
    if key not in choices:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, choices))}, found {key!r}")
    return choices[key]


def tensors(r: Recurrence) -> list[tuple[str, Tensor]]:
    """The tensor fields that are given, by name."""
    return [(n, x) for n in (*TIME_FIELDS, "initial_state") if (x := getattr(r, n)) is not None]


def terms(x: Tensor) -> list[Tensor]:
    """The rank-1 terms of keys or values [B,T,H,(R,)K]."""
    return [x] if x.ndim == 4 else list(x.unbind(3))


def over_time(r: Recurrence) -> list[tuple[str, Tensor]]:
    """The given fields that have a time axis, by name."""
    return [(n, x) for n in TIME_FIELDS if (x := getattr(r, n)) is not None]


def check(r: Recurrence) -> None:
    """Types, shapes, devices and pairing of the fields; see `Recurrence` for what is raised."""
    for name, x in tensors(r):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, found {getattr(x, 'dtype', type(x).__name__)}")
    for name, side in (("k", "K"), ("u", "V")):
        if getattr(r, name).ndim not in (4, 5):
            raise ValueError(f"{name} must be [B,T,H,{side}] or [B,T,H,R,{side}], found {list(getattr(r, name).shape)}")
    if 0 in r.k.shape or 0 in r.u.shape:
        found = f"k {list(r.k.shape)}, u {list(r.u.shape)}"
        raise ValueError(f"a recurrence needs at least one row, token, head and channel, found {found}")
    sizes = {"B": r.B, "T": r.T, "H": r.H, "K": r.K, "V": r.V, "R": r.R}
    write, erase = "BTHR" if r.k.ndim == 5 else "BTH", "BTH"
    if r.b is not None and r.b.ndim == 5:
        erase, sizes["E"] = "BTHE", r.b.shape[3]
    axes = {"k": write + "K", "u": write + "V", "a": erase + "K", "b": erase + "K", "beta": write}
    axes |= {"q": "BTHK", "initial_state": "BHKV"}
    axes["log_decay"] = "BTH" if r.log_decay is None or r.log_decay.ndim == 3 else "BTHK"
    for name, x in tensors(r):
        want = axes[name]
        if list(x.shape) != [sizes[c] for c in want]:
            raise ValueError(f"{name} must be {_spell(want, sizes)} as k {list(r.k.shape)} says, found {list(x.shape)}")
        if x.device != r.device:
            raise ValueError(f"all fields must be on one device: k is on {r.device}, {name} on {x.device}")
    if (r.a is not None or r.beta is not None) != (r.b is not None):
        found = ", ".join(n for n in ("a", "b", "beta") if getattr(r, n) is not None)
        raise ValueError(f"an erase needs b together with a (or beta), found only {found}")
    if r.beta is not None and r.b is not None and r.b.shape != r.k.shape:
        found = f"k {list(r.k.shape)}, b {list(r.b.shape)}"
        raise ValueError(f"beta says that each term of the write erases along its own key, but found {found}")


def _spell(axes: str, sizes: dict[str, int]) -> str:
    return "[" + ",".join(f"{c}={sizes[c]}" for c in axes) + "]"
