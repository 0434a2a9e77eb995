"""Hooks that must act: names are checked before a run, and hooks that stayed silent after it."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint, LensHandle

from hookpoints.errors import HookDidNotFireError, UnknownHookError, nearest
from hookpoints.hooks.points import scopes_of
from hookpoints.scopes import scoped

if TYPE_CHECKING:
    from hookpoints.layer.context import Scope

Hook = Callable[..., object]
"""Called with an activation and ``hook=`` its hook point; returns another activation, or None to leave it."""
Name = str | Callable[[str], bool]
"""A hook's name, or a predicate on names."""
NamedHook = tuple[Name, Hook]
Hooks = Sequence[NamedHook]
Way = Literal["fwd", "bwd"]

ADDING = threading.RLock()
"""Held while hooks are put on points or taken off."""


def canonical(name: str, known: Container[str]) -> str:
    """The hook in ``known`` that ``name`` is TransformerLens' way to spell, or ``name`` itself.

    ``transformer_lens.utils.get_act_name`` puts names into ``blocks.{l}.attn.`` ("z", "q", "pattern") or
    ``blocks.{l}.`` ("write", "read", "heads.1.write_vec"); on a recurrent layer these are hooks of its mixer.
    """
    spelt = None if name in known else _SPELT.fullmatch(name)
    if spelt is None:
        return name
    layer, heads, hook = spelt.groups()
    inside = f"blocks.{layer}.mixer.{heads or ''}hook_{hook}"
    return inside if inside in known else name


_SPELT = re.compile(r"blocks\.(\d+)\.(?:attn\.)?hook_(heads\.\d+\.)?(?:hook_)?(\w+)")


def find_hook(model: HookedRootModule, name: Name) -> Name:
    """``name`` as the model has it (see ``canonical``), or the predicate on names that it is.

    Raises:
        UnknownHookError: no hook of ``model`` is named so, or the predicate holds for none.
    """
    if callable(name):
        if not any(name(known) for known in model.hook_dict):
            raise UnknownHookError(
                f"the filter {name!r} matches none of the {len(model.hook_dict)} hooks of this model"
            )
        return name
    name = canonical(name, model.mod_dict)
    if not hasattr(model.mod_dict.get(name), "add_hook"):
        raise UnknownHookError(f"this model has no hook named {name!r}{nearest(name, model.hook_dict)}")
    return name


class ScopedHooks:
    """Hooks that act inside one scope, and are missed if they never do.

    Args:
        scope: hooks act in the thread (more exactly, the context) in which it is open; others run as if they were not
            there. A scope that an interrupt closed in passing leaves hooks that do nothing.
        points: hook points by name, to resolve predicates.
        stay: hooks stay in force after the scope, everywhere (TransformerLens' ``reset_hooks_end=False``).
    """

    def __init__(
        self, scope: Scope, points: Mapping[str, nn.Module], fwd: Hooks = (), bwd: Hooks = (), stay: bool = False
    ):
        self._scope, self._stay = scope, stay
        self._called: set[tuple[str, Way]] = set()
        self._went_backward = False
        ways: tuple[tuple[Way, Hooks], ...] = (("fwd", fwd), ("bwd", bwd))
        self._hooks: list[tuple[str, Way, Hook]] = [
            (one, way, self._watched(one, way, hook))
            for way, hooks in ways
            for name, hook in hooks
            for one in ([known for known in points if name(known)] if callable(name) else [name])
        ]

    @scoped
    def set_on(self, modules: Mapping[str, nn.Module], landmarks: Iterable[nn.Module]) -> Iterator[None]:
        """Put the hooks on their points for the length of the scope. A backward pass through any of ``landmarks``
        that ran forward meanwhile is noticed."""
        handles: list[tuple[HookPoint, Way, LensHandle]] = []
        marks = []
        try:
            for name, way, call in self._hooks:
                point = modules[name]
                assert isinstance(point, HookPoint), f"{name} holds {type(point).__name__}, which takes no hooks"
                with ADDING:
                    point.add_hook(call, dir=way)
                    handles.append((point, way, _visible(point, way)[-1]))
                    if not self._stay:
                        scopes_of(point).append(self._scope)
            if any(way == "bwd" for _, way, _ in self._hooks):
                marks += [module.register_forward_hook(self._mark) for module in landmarks]
            yield
        finally:
            for mark in marks:
                mark.remove()
            for point, way, handle in [] if self._stay else handles:
                with ADDING:  # the scope first: a hook that an interrupt leaves behind without one only costs time
                    if self._scope in scopes_of(point):
                        scopes_of(point).remove(self._scope)
                    visible = _visible(point, way)
                    if handle in visible:  # else reset_hooks took it off
                        visible.remove(handle)
                        handle.hook.remove()

    def check(self) -> None:
        """Raise HookDidNotFireError if the model ran in the scope and a hook was never called."""
        silent = self._silent("fwd")
        if self._scope.passes and silent:
            raise HookDidNotFireError(
                f"{len(silent)} hook(s) never fired though the model ran: {', '.join(silent[:3])}. Was the layer "
                "outside start_at_layer / stop_at_layer, or is an SAE attached there (then hook its inner points)?"
            )
        silent = self._silent("bwd")
        if self._went_backward and silent:
            raise HookDidNotFireError(
                f"{len(silent)} backward hook(s) never fired though a backward pass ran: {', '.join(silent[:3])}. "
                "What was differentiated does not depend on that activation: was the layer above stop_at_layer, or "
                "the activation replaced by a forward hook?"
            )

    def _silent(self, way: Way) -> list[str]:
        return [name for name, set_way, _ in self._hooks if set_way == way and (name, way) not in self._called]

    def _watched(self, name: str, way: Way, hook: Hook) -> Hook:
        @functools.wraps(hook, updated=())
        def watched(*args: object, **kwargs: object) -> object:
            if not (self._stay or self._scope.active()):
                return None
            self._called.add((name, way))
            return hook(*args, **kwargs)

        return watched

    def _mark(self, _module: nn.Module, _args: object, output: object) -> None:
        value = output[0] if isinstance(output, tuple) else output
        if isinstance(value, Tensor) and value.requires_grad and self._scope.active():
            value.register_hook(self._note)

    def _note(self, _gradient: Tensor) -> None:
        self._went_backward = True


def _visible(point: HookPoint, way: Way) -> list[LensHandle]:
    return point.fwd_hooks if way == "fwd" else point.bwd_hooks
