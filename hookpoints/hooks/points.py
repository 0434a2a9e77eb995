"""The tree of hook modules, grown from ``hooks.table``; it holds no weights and knows no model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hookpoints.errors import HookShapeError
from hookpoints.hooks import table as hook_table
from hookpoints.hooks.late import extend
from hookpoints.refused import Explaining

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint

    from hookpoints.layer.context import HookScope
else:
    HookPoint = nn.Module  # until a first point is made

HOOK_DICTS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Where PyTorch keeps the hooks of a module, by whatever method they came."""
_READING = "hookpoints_reads"


class Listeners:
    """Knows which names of some sets of hook points have hooks attached.

    Every way to attach ends in a dictionary: of the hooks of a point, or of the modules of a set. These dictionaries
    note what is put into them and deleted from them (``_Noting``), and after a note everything is looked through once.
    So nothing is counted that an interrupt could leave wrong. Hooks that go another way only cost time.
    """

    def __init__(self) -> None:
        self.sets: list[_Noting] = []
        self.noted = object()
        self.known: tuple[object, frozenset[str]] = (None, frozenset())

    def names(self) -> frozenset[str]:
        """Of points that have a hook, in scopes of this thread or of others, or that something replaces."""
        noted = self.noted
        known, names = self.known
        if noted is not known:
            names = frozenset(name for points in self.sets for name, point in points.items() if _is_hooked(point))
            self.known = (noted, names)  # a hook that another thread put on meanwhile made another note
        return names

    def exist(self) -> bool:
        """Whether there is any such point."""
        return bool(self.names())


class _Noting(OrderedDict[Any, Any]):
    """A dictionary of PyTorch's that notes what is put into it or deleted from it."""

    def __init__(self, listeners: Listeners | None = None, entries: Iterable[tuple[Any, Any]] = ()):
        self.listeners = listeners or Listeners()  # a copy is made without, and then gets a copy of the original's
        super().__init__(entries)

    def __setitem__(self, key: object, value: object) -> None:
        super().__setitem__(key, value)
        self.listeners.noted = object()

    def __delitem__(self, key: object) -> None:
        super().__delitem__(key)
        self.listeners.noted = object()


class Point(HookPoint):
    """TransformerLens' hook point; ``listeners`` note each hook that is put on it."""

    def __new__(cls, *_: object) -> Self:
        extend(Point, "transformer_lens.hook_points", "HookPoint")
        return super().__new__(cls)

    def __init__(self, listeners: Listeners | None = None):
        super().__init__()
        self.listeners = listeners or Listeners()
        for kind in HOOK_DICTS:
            setattr(self, kind, getattr(self, kind))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, _Noting(self.listeners, value.items()) if name in HOOK_DICTS else value)  # type: ignore[arg-type]


class HookSet(Explaining, nn.Module):
    """Hook points of one scope, as attributes: ``hook_set.hook_q``. Sets may share their ``listeners``."""

    def __init__(self, names: list[str], listeners: Listeners | None = None):
        super().__init__()
        self.listeners = listeners or Listeners()
        self._modules = _Noting(self.listeners, [(name, Point(self.listeners)) for name in names])
        self.listeners.sets.append(self._modules)

    def listens(self, *names: str) -> bool:
        """Whether a hook is attached to one of ``names``."""
        points = self._modules
        hooked = self.listeners.names()
        return any(is_listening(points[name]) for name in names if name in hooked and name in points)

    def fire(self, name: str, value: Tensor) -> Tensor:
        """Pass ``value`` through a hook; returns what the hook returns, checked for shape."""
        point = self._modules[name]
        assert point is not None
        return fire(point, name, value)

    def watch(self, name: str, value: Tensor, *, seen_later: bool = False) -> tuple[Tensor, bool]:
        """Fire a hook on ``value``: what it returned, and whether that differs from what it was given. Edits in place
        count, through numpy and ``.data`` too, of which PyTorch takes no note. Costs a copy of ``value``, and a wait
        for a device, unless all that is attached only reads.

        ``seen_later``: the caller looks at the difference itself, so that another tensor than ``value`` counts as
        changed without a wait.

        In grad mode the hook is given its own view and counts as changed, so that a gradient taken at the hook
        sees everything downstream of it.
        """
        if torch.is_grad_enabled() and value.requires_grad:
            return self.fire(name, value.view_as(value)), True
        only_reads = self.only_reads(name)
        before = value if only_reads else value.clone()
        returned = self.fire(name, value)
        changed = returned.requires_grad or (seen_later and returned is not value)
        return returned, changed or not (only_reads or torch.equal(before, returned))

    def only_reads(self, name: str) -> bool:
        """Whether all hooks of a point are known to change nothing (`mark_reading`)."""
        point = self._modules[name]
        if type(point) is not Point:
            return False
        return all(hasattr(hook, _READING) for kind in HOOK_DICTS for hook in getattr(point, kind).values())


def mark_reading(point: nn.Module, handle: RemovableHandle) -> None:
    """Say of a forward hook of a point that it changes nothing, so that values need not be compared after it."""
    setattr(point._forward_hooks[handle.id], _READING, True)


def fire(point: nn.Module, name: str, value: Tensor) -> Tensor:
    """Pass ``value`` through a hook point; returns what its hooks return, in the dtype of ``value``. A backward hook
    gets a gradient in grad mode, also where no trained weight is below.

    Raises:
        HookShapeError: that is no real tensor of the same shape on the same device.
    """
    asks_back = point._backward_hooks or point._backward_pre_hooks
    if asks_back and torch.is_grad_enabled() and not value.requires_grad:
        value = value.detach().requires_grad_()
    returned = point(value)
    if not isinstance(returned, Tensor) or returned.shape != value.shape or returned.device != value.device:
        what = (
            f"{list(returned.shape)} on {returned.device}" if isinstance(returned, Tensor) else type(returned).__name__
        )
        raise HookShapeError(
            f"a hook on {getattr(point, 'name', name)} must return a tensor of shape {list(value.shape)} on "
            f"{value.device} (or None to leave it), got {what}"
        )
    if returned.dtype == value.dtype:
        return returned
    if returned.is_complex():
        raise HookShapeError(f"a hook on {getattr(point, 'name', name)} must return real numbers, got complex ones")
    return returned.to(value.dtype)


def through_hook(
    hooks: HookSet, name: str, scale: float = 1.0, split: tuple[int, int] | None = None
) -> Callable[[Tensor], Tensor]:
    """Takes a value [B,T,...] through a hook that sees it times ``scale``, with two axes of the sizes
    ``split`` for its last."""

    def through(value: Tensor) -> Tensor:
        if not hooks.listens(name):
            return value
        # Of heads a copy: torch lets nobody change a part of a projection (queries with their gates) in place.
        shown = value if split is None else value.reshape(*value.shape[:2], *split).clone()
        if scale == 1.0:
            return hooks.fire(name, shown).reshape(value.shape)
        fired, changed = hooks.watch(name, shown * scale)
        # The difference, so that what a hook leaves as it is stays bit-identical.
        if changed:
            return value + ((fired - shown * scale) / scale).reshape(value.shape)
        return value

    return through


class MixerHooks(HookSet):
    """Hook points of a recurrent mixer; ``heads[h]`` holds those of head h."""

    def __init__(self, heads: int, factors: tuple[str, ...]):
        super().__init__([row.name for row in hook_table.rows("mixer") if row.factor is None or row.factor in factors])
        of_head = [row.name for row in hook_table.rows("head")]
        self.heads = nn.ModuleList(HookSet(of_head, self.listeners) for _ in range(heads))


class BlockHooks(HookSet):
    """Hook points of a block, all but those named in ``absent``; ``mixer`` holds those of a recurrent mixer, ``attn``
    those of attention that are named in ``attention``."""

    def __init__(self, mixer: MixerHooks | None, attention: Collection[str] = (), absent: Collection[str] = ()):
        super().__init__([row.name for row in hook_table.rows("block") if row.name not in absent])
        if mixer is not None:
            self.mixer = mixer
        if attention:
            self.attn = HookSet([row.name for row in hook_table.rows("attn") if row.name in attention], self.listeners)


def _is_hooked(point: nn.Module | None) -> bool:
    """Whether a member of a set has hooks or is no hook point; sets inside it speak for themselves."""
    if isinstance(point, HookSet | nn.ModuleList):
        return False
    return type(point) is not Point or any(getattr(point, kind) for kind in HOOK_DICTS)


def is_listening(point: nn.Module | None) -> bool:
    """Whether a hook point does anything here: it has hooks whose scope (if they have one) is in force for the code
    that runs now, or something (an attached SAE) replaces it."""
    if type(point) is not Point:
        return point is not None
    count = sum(len(getattr(point, kind)) for kind in HOOK_DICTS)
    if not count:
        return False
    scopes = scopes_of(point)  # type: ignore[arg-type]
    return count > len(scopes) or any(scope.active() for scope in scopes)


def scopes_of(point: nn.Module) -> list[HookScope]:
    """The scopes of a point's hooks that have one, one entry per hook. Hooks sit on modules, which threads share, but
    a scope belongs to the thread that opened it."""
    return point.__dict__.setdefault("hookpoints_scopes", [])
