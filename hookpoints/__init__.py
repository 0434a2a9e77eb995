"""Recurrent-write hook points for recurrent and hybrid language models, in TransformerLens' vocabulary."""

from .attach import Attached, attach
from .edits import WriteEdit
from .errors import (
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
