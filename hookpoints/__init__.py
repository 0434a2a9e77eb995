"""Recurrent-write hook points for recurrent and hybrid language models, in TransformerLens' vocabulary."""

from hookpoints.edits.edit import WriteEdit
from hookpoints.edits.session import EditedRun, EditSession
from hookpoints.errors import (
    BridgeWarning,
    EditError,
    Float16OverflowError,
    HookDidNotFireError,
    HookpointsError,
    HookShapeError,
    InputError,
    SelfCheckError,
    UnknownHookError,
    UnsupportedModelError,
)
from hookpoints.hooks.table import HOOKS, HookRow
from hookpoints.model.attach import Attached, attach
from hookpoints.model.recurrent import HookedRecurrent
from hookpoints.recurrence import Recurrence, ScanResult

__all__ = [
    "HOOKS",
    "Attached",
    "BridgeWarning",
    "EditError",
    "EditSession",
    "EditedRun",
    "Float16OverflowError",
    "HookDidNotFireError",
    "HookRow",
    "HookShapeError",
    "HookedRecurrent",
    "HookpointsError",
    "InputError",
    "Recurrence",
    "ScanResult",
    "SelfCheckError",
    "UnknownHookError",
    "UnsupportedModelError",
    "WriteEdit",
    "attach",
]
