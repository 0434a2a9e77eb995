"""Importing flash-linear-attention, with or without triton, without side effects on transformers.

fla registers its own Mamba and Mamba-2 over those of transformers; here transformers keeps its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from types import ModuleType

import torch
from torch.utils import _triton
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hookpoints.errors import UnsupportedModelError
from hookpoints.fla.scope import install
from hookpoints.fla.triton_standin import has_triton, standing_in

INSTALL = 'pip install "sae-lens-writesae[fla]"'
MODEL_TYPES = frozenset(
    {"comba", "delta_net", "gated_deltanet", "gated_deltaproduct", "gla", "hgrn2"}
    | {"kda", "retnet", "rwkv6", "rwkv7", "simple_gla"}
)
"""Model types that only fla defines and hookpoints hooks; a checkpoint of one is why fla is imported."""

_TAKEN_BY_TRANSFORMERS = {
    "fla.ops.gated_delta_rule": ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"),
    "fla.ops.kda": ("chunk_kda", "fused_recurrent_kda"),
}
"""Ops that transformers binds in place of its own wherever they can be imported."""


def import_fla() -> ModuleType:
    """fla, complete. Without triton its models load, and run on a CPU while they are hooked.

    The first call imports all of fla's layers and models (seconds). transformers' Auto classes stay what they were,
    and where triton is missing its own models do not see fla's ops, which could not run.

    Raises:
        UnsupportedModelError: fla is not installed (names the extra), or cannot be imported.
    """
    if importlib.util.find_spec("fla") is None:
        raise UnsupportedModelError(f"this is a model of flash-linear-attention, which is not installed: {INSTALL}")
    loaded = sys.modules.get("fla")
    if loaded is None or not hasattr(loaded, "models"):
        loaded = _with_triton() if has_triton() else _without_triton()
    restore_auto_classes()
    if not hasattr(loaded, "models"):
        raise UnsupportedModelError(
            f"flash-linear-attention {getattr(loaded, '__version__', '')} was found without its models, which come "
            f"with the package flash-linear-attention (not fla-core alone): {INSTALL}"
        )
    install()
    return loaded


def _with_triton() -> ModuleType:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Triton is not supported on current platform")
        return importlib.import_module("fla")


def _without_triton() -> ModuleType:
    _settle_torch()
    # Someone may have imported fla before: without triton that gives an empty package.
    for name in [name for name in sys.modules if name == "fla" or name.startswith("fla.")]:
        del sys.modules[name]
    with standing_in():
        fla = _with_triton()
    for name, ops in _TAKEN_BY_TRANSFORMERS.items():
        for op in ops if name in sys.modules else ():
            vars(sys.modules[name]).pop(op, None)
    return fla


def _settle_torch() -> None:
    """Let PyTorch find out now, and remember, that there is no triton: it would otherwise ask during the import."""
    _triton.has_triton_package()
    importlib.import_module("torch._inductor.runtime.triton_compat")
    torch.compile(torch.nn.Identity())


def restore_auto_classes() -> None:
    """Take fla's configurations out of the place of transformers' own.

    Model types that only fla knows ("gla", "retnet" ...) stay registered: they are how its checkpoints are found.
    """
    registered = CONFIG_MAPPING._extra_content  # type: ignore[attr-defined]
    for model_type in [name for name, config in registered.items() if _is_fla(config)]:
        if model_type in CONFIG_MAPPING._mapping:  # type: ignore[attr-defined]
            del registered[model_type]


def _is_fla(config: type) -> bool:
    return config.__module__.startswith("fla.")
