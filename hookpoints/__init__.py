"""Recurrent-write hook points for recurrent and hybrid language models, in TransformerLens' vocabulary.

The names that most programs need. Everything else is imported from its own module: ``hookpoints.errors`` (every error),
``hookpoints.recurrence`` (the mathematics), ``hookpoints.rules`` (update rules), ``hookpoints.model`` (loading,
layout), ``hookpoints.hooks.table`` and ``hookpoints.edits``.

Names are imported when they are asked for: ``import hookpoints`` loads neither torch nor transformers, ``WriteEdit``
and ``Recurrence`` load torch, and ``HookedRecurrent`` loads both. TransformerLens, whose classes it extends, is loaded
with the first model.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import hookpoints._waiting  # before torch loads  # noqa: F401

if TYPE_CHECKING:
    from hookpoints import embedded, errors, zoo
    from hookpoints.circuit.attribute import attribute, attribute_task
    from hookpoints.circuit.graph import Graph
    from hookpoints.circuit.nodes import write_attribution
    from hookpoints.edits.edit import EditRow, WriteEdit
    from hookpoints.edits.session import EditSession
    from hookpoints.errors import EditError, HookpointsError, UnknownHookError, UnknownModelError, UnsupportedModelError
    from hookpoints.hooks.table import HOOKS
    from hookpoints.memory.forgetting import Certificate, forgot
    from hookpoints.memory.memory import Memory
    from hookpoints.memory.reader import MemoryReader
    from hookpoints.model.attach import attach
    from hookpoints.model.bridge import as_bridge
    from hookpoints.model.cost import Cost, cost
    from hookpoints.model.loading import cached, default_device, model_types
    from hookpoints.model.recurrent import HookedRecurrent
    from hookpoints.recurrence.recurrence import Recurrence
    from hookpoints.rules.known import RULES

_HOMES = {
    "circuit.attribute": ("attribute", "attribute_task"),
    "circuit.graph": ("Graph",),
    "circuit.nodes": ("write_attribution",),
    "edits.edit": ("EditRow", "WriteEdit"),
    "edits.session": ("EditSession",),
    "errors": ("EditError", "HookpointsError", "UnknownHookError", "UnknownModelError", "UnsupportedModelError"),
    "hooks.table": ("HOOKS",),
    "memory.forgetting": ("Certificate", "forgot"),
    "memory.memory": ("Memory",),
    "memory.reader": ("MemoryReader",),
    "model.attach": ("attach",),
    "model.bridge": ("as_bridge",),
    "model.cost": ("Cost", "cost"),
    "model.loading": ("cached", "default_device", "model_types"),
    "model.recurrent": ("HookedRecurrent",),
    "recurrence.recurrence": ("Recurrence",),
    "rules.known": ("RULES",),
}
"""Module -> the names that the package has from it."""
_MODULES = ("embedded", "errors", "zoo")

__all__ = [
    "HOOKS",
    "RULES",
    "Certificate",
    "Cost",
    "EditError",
    "EditRow",
    "EditSession",
    "Graph",
    "HookedRecurrent",
    "HookpointsError",
    "Memory",
    "MemoryReader",
    "Recurrence",
    "UnknownHookError",
    "UnknownModelError",
    "UnsupportedModelError",
    "WriteEdit",
    "as_bridge",
    "attach",
    "attribute",
    "attribute_task",
    "cached",
    "cost",
    "default_device",
    "embedded",
    "errors",
    "forgot",
    "model_types",
    "write_attribution",
    "zoo",
]


if not TYPE_CHECKING:  # who checks types would take any name for one that is there

    def __getattr__(name: str) -> object:
        if name in _MODULES:
            return importlib.import_module(f"hookpoints.{name}")
        for module, names in _HOMES.items():
            if name in names:
                value = getattr(importlib.import_module(f"hookpoints.{module}"), name)
                globals()[name] = value
                return value
        raise AttributeError(f"module 'hookpoints' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
