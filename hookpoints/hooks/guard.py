"""Hooks that must fire: names are checked before a run, firing after it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from hookpoints.errors import HookDidNotFireError, UnknownHookError, nearest

Name = str | Callable[[str], bool]
NamedHook = tuple[Name, Callable[..., Any]]


def check_names(model: Any, name: Name) -> None:
    """Raise UnknownHookError unless ``name`` (or predicate) names a hook of ``model``."""
    if callable(name):
        if not any(name(known) for known in model.hook_dict):
            raise UnknownHookError(
                f"the filter {name!r} matches none of the {len(model.hook_dict)} hooks of this model"
            )
        return
    found = model.mod_dict.get(name)
    if found is not None and hasattr(found, "add_hook"):
        return
    why = _reason(model, name) if found is None else "; this names a group of hooks"
    raise UnknownHookError(f"no hook named {name!r} in {model.cfg.model_name}{why}{nearest(name, model.hook_dict)}")


def _reason(model: Any, name: str) -> str:
    """Why there is no such hook, where its name tells."""
    parts, cfg = name.split("."), model.cfg
    if len(parts) < 2 or parts[0] != "blocks" or not parts[1].isdigit():
        return ""
    layer = int(parts[1])
    if layer >= cfg.n_layers:
        return f"; blocks are 0 to {cfg.n_layers - 1}"
    mixer = len(parts) > 2 and parts[2] == "mixer"
    if mixer and layer not in cfg.layers:
        return f"; block {layer} has no recurrence and so no writes (recurrent: {cfg.recurrent_layers})"
    if mixer and len(parts) > 4 and parts[3] == "heads":
        return f"; layer {layer} has heads 0 to {cfg.layers[layer].H - 1}"
    return ""


class FiringWatch:
    """Wraps hooks so that silence can be told from firing, forward and backward."""

    def __init__(self, known: Mapping[str, HookPoint], fwd: Sequence[NamedHook], bwd: Sequence[NamedHook] = ()):
        self._fired: set[tuple[str, str]] = set()
        self._went_backward = False
        self.fwd_hooks = list(self._watched("forward", known, fwd))
        self.bwd_hooks = list(self._watched("backward", known, bwd))

    @contextmanager
    def backward(self, landmarks: Iterable[nn.Module]) -> Iterator[None]:
        """Notice a backward pass through any of ``landmarks`` that ran forward while this is open."""
        handles = [module.register_forward_hook(self._mark) for module in landmarks] if self.bwd_hooks else []
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def check(self, ran: bool) -> None:
        """Raise HookDidNotFireError for hooks that were set and never called; ``ran``: whether the model did."""
        silent = self._silent("forward", self.fwd_hooks)
        if ran and silent:
            raise HookDidNotFireError(
                f"{len(silent)} hook(s) never fired though the model ran: {', '.join(silent[:3])}. Was the layer "
                "outside start_at_layer / stop_at_layer, or is an SAE attached there (then hook its inner points)?"
            )
        silent = self._silent("backward", self.bwd_hooks)
        if self._went_backward and silent:
            raise HookDidNotFireError(
                f"{len(silent)} backward hook(s) never fired though a backward pass ran: {', '.join(silent[:3])}. "
                "What was differentiated does not depend on that activation: was the layer above stop_at_layer, or "
                "the activation replaced by a forward hook?"
            )

    def _silent(self, way: str, hooks: Sequence[tuple[str, Any]]) -> list[str]:
        return [name for name, _ in hooks if (way, name) not in self._fired]

    def _watched(
        self, way: str, known: Mapping[str, HookPoint], hooks: Sequence[NamedHook]
    ) -> Iterator[tuple[str, Callable[..., Any]]]:
        for name, hook in hooks:
            for one in [known_name for known_name in known if name(known_name)] if callable(name) else [name]:
                yield one, self._counted((way, one), hook)

    def _counted(self, key: tuple[str, str], hook: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(hook, updated=())
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._fired.add(key)
            return hook(*args, **kwargs)

        return counted

    def _mark(self, _module: nn.Module, _args: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        if isinstance(value, Tensor) and value.requires_grad:
            value.register_hook(self._note)

    def _note(self, _gradient: Tensor) -> None:
        self._went_backward = True
