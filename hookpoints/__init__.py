"""Recurrent-write hook points for recurrent and hybrid language models, in TransformerLens' vocabulary."""

from .attach import Attached, attach
from .edits import WriteEdit
from .errors import (
    BridgeWarning,
    EditError,
    HookDidNotFireError,
    HookpointsError,
    HookShapeError,
    SelfCheckError,
    UnknownHookError,
    UnsupportedModelError,
)
from .hook_table import HOOKS, HookRow
from .model import HookedRecurrent
from .recurrence import Recurrence, ScanResult
from .session import EditedRun, EditSession

__all__ = [
    "HOOKS",
    "Attached",
    "BridgeWarning",
    "EditError",
    "EditSession",
    "EditedRun",
    "HookDidNotFireError",
    "HookRow",
    "HookShapeError",
    "HookedRecurrent",
    "HookpointsError",
    "Recurrence",
    "ScanResult",
    "SelfCheckError",
    "UnknownHookError",
    "UnsupportedModelError",
    "WriteEdit",
    "attach",
]
