"""fla's tiny random models, on a CPU. Importing this skips a module's tests where fla is missing."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from fla_families import FAMILIES, tiny

if any(importlib.util.find_spec(name) is None for name in ("fla", "triton")):
    pytest.skip("flash-linear-attention or triton is not installed", allow_module_level=True)

from fla_cpu import import_fla

MODEL_TYPES = sorted(FAMILIES)


def make_fla(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny random model."""
    return tiny(import_fla().models, model_type, seed, **changes)
