"""Recurrent-write hook points for recurrent and hybrid language models, in TransformerLens' vocabulary.

The names that most programs need. Everything else is imported from its own module: ``hookpoints.errors`` (every error),
``hookpoints.recurrence`` (the mathematics), ``hookpoints.rules`` (update rules), ``hookpoints.model`` (loading,
layout), ``hookpoints.hooks.table`` and ``hookpoints.edits``.
"""

import hookpoints._waiting  # before torch loads  # noqa: F401
from hookpoints import embedded, errors, zoo
from hookpoints.edits.edit import EditRow, WriteEdit
from hookpoints.edits.session import EditSession
from hookpoints.errors import EditError, HookpointsError, UnknownHookError, UnknownModelError, UnsupportedModelError
from hookpoints.hooks.table import HOOKS
from hookpoints.memory.memory import Memory
from hookpoints.model.attach import attach
from hookpoints.model.attribution import check_attribution, source_attribution, write_attribution
from hookpoints.model.loading import cached, model_types
from hookpoints.model.recurrent import HookedRecurrent
from hookpoints.recurrence.recurrence import Recurrence
from hookpoints.rules import RULES

__all__ = [
    "HOOKS",
    "RULES",
    "EditError",
    "EditRow",
    "EditSession",
    "HookedRecurrent",
    "HookpointsError",
    "Memory",
    "Recurrence",
    "UnknownHookError",
    "UnknownModelError",
    "UnsupportedModelError",
    "WriteEdit",
    "attach",
    "cached",
    "check_attribution",
    "embedded",
    "errors",
    "model_types",
    "source_attribution",
    "write_attribution",
    "zoo",
]
