"""fla's tiny random models, on a CPU. Importing this skips a module's tests where fla is missing."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from fla_cpu import import_fla
from fla_families import FAMILIES, tiny

if importlib.util.find_spec("fla") is None:
    pytest.skip('flash-linear-attention is not installed (pip install ".[fla]")', allow_module_level=True)

MODEL_TYPES = (*sorted(FAMILIES), "simple_gla")
"""All that the tests of hooks and edits run on."""


def make_fla(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny random model. ``simple_gla``, of which fla has the layer and no model, is a GLA model with that layer."""
    if model_type == "simple_gla":
        return _simple_gla(seed, **changes)
    return tiny(import_fla().models, model_type, seed, **changes)


def _simple_gla(seed: int, **changes: Any) -> Any:
    model = make_fla("gla", seed, **changes)
    from fla.layers.simple_gla import SimpleGatedLinearAttention

    torch.manual_seed(seed + 1)
    for index, block in enumerate(model.model.layers):
        options = {"hidden_size": 32, "num_heads": 2, "expand_k": 0.5, "expand_v": 1.0, "use_short_conv": index == 1}
        block.attn = SimpleGatedLinearAttention(**options, layer_idx=index).eval()
    return model
