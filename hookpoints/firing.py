"""Hooks that must fire: names are checked before a run, firing after it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformer_lens.hook_points import HookPoint

from .errors import HookDidNotFireError, UnknownHookError, nearest

Name = str | Callable[[str], bool]


def check_names(model: Any, name: Name) -> None:
    """Raise UnknownHookError unless ``name`` (or predicate) names a hook of ``model``."""
    if callable(name):
        if not any(name(known) for known in model.hook_dict):
            raise UnknownHookError(
                f"the filter {name!r} matches none of the {len(model.hook_dict)} hooks of this model"
            )
        return
    if name in model.mod_dict:
        return
    why = ""
    parts = name.split(".")
    if len(parts) > 2 and parts[0] == "blocks" and parts[1].isdigit() and parts[2] == "mixer":
        layer = int(parts[1])
        if layer < model.cfg.n_layers and layer not in model.cfg.layers:
            why = f"; block {layer} has no recurrence and so no writes (recurrent: {model.cfg.recurrent_layers})"
        elif layer in model.cfg.layers and len(parts) > 4 and parts[3] == "heads":
            why = f"; layer {layer} has heads 0 to {model.cfg.layers[layer].H - 1}"
    raise UnknownHookError(f"no hook named {name!r} in {model.cfg.model_name}{why}{nearest(name, model.hook_dict)}")


class FiringWatch:
    """Wraps forward hooks so that silence can be told from firing."""

    def __init__(self, known: Mapping[str, HookPoint], fwd_hooks: Sequence[tuple[Name, Callable[..., Any]]]):
        self._fired: set[str] = set()
        self._expected: list[str] = []
        self.hooks: list[tuple[str, Callable[..., Any]]] = []
        for name, hook in fwd_hooks:
            for one in [known_name for known_name in known if name(known_name)] if callable(name) else [name]:
                self._expected.append(one)
                self.hooks.append((one, self._counted(one, hook)))

    def check(self) -> None:
        """Raise HookDidNotFireError for hooks that were set and never called."""
        silent = [name for name in self._expected if name not in self._fired]
        if silent:
            raise HookDidNotFireError(
                f"{len(silent)} hook(s) never fired though the model ran: {', '.join(silent[:3])}. Was the layer "
                "outside start_at_layer / stop_at_layer, or is an SAE attached there (then hook its inner points)?"
            )

    def _counted(self, name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(hook, updated=())
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._fired.add(name)
            return hook(*args, **kwargs)

        return counted
