"""Importing flash-linear-attention without side effects on transformers.

fla registers its own Mamba and Mamba-2 over those of transformers; here transformers keeps its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from types import ModuleType

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hookpoints.errors import UnsupportedModelError

INSTALL = 'in the clone of the repository, pip install -e ".[fla]"'
MODEL_TYPES = frozenset(
    {"comba", "delta_net", "gated_deltanet", "gated_deltaproduct", "gla", "hgrn", "hgrn2", "kda", "retnet", "rwkv6"}
    | {"rwkv7"}
)
"""Model types that only fla defines and that have a rule, here or in `hookpoints-rare`; a checkpoint of one is why fla
is imported."""


def import_fla() -> ModuleType:
    """fla, complete. The first call imports all of its layers and models, which takes seconds. transformers' Auto
    classes stay what they were.

    Raises:
        UnsupportedModelError: fla or triton is not installed (names the extra), or fla without its models.
    """
    if importlib.util.find_spec("fla") is None:
        raise UnsupportedModelError(f"this is a model of flash-linear-attention, which is not installed: {INSTALL}")
    if "fla.models" not in sys.modules and importlib.util.find_spec("triton") is None:
        raise UnsupportedModelError(
            "flash-linear-attention computes with Triton, which is not installed: pip install triton, and run on a "
            "GPU. Without it run RWKV-7 checkpoints of its format, and the model types of transformers"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Triton is not supported on current platform")
        loaded = importlib.import_module("fla")
    restore_auto_classes()
    if not hasattr(loaded, "models"):
        raise UnsupportedModelError(
            f"flash-linear-attention was found without its models, which come with the package flash-linear-attention "
            f"(not fla-core alone): {INSTALL}"
        )
    return loaded


def restore_auto_classes() -> None:
    """Take fla's configurations out of the place of transformers' own.

    Model types that only fla knows ("gla", "retnet" ...) stay registered: they are how its checkpoints are found.
    """
    registered = CONFIG_MAPPING._extra_content  # type: ignore[attr-defined]
    for model_type in [name for name, config in registered.items() if config.__module__.startswith("fla.")]:
        if model_type in CONFIG_MAPPING._mapping:  # type: ignore[attr-defined]
            del registered[model_type]
