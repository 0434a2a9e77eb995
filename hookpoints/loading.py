"""Loading causal language models for hooking: from the hub, from a folder, or from this package."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from . import embedded
from .errors import UnsupportedModelError


class Loaded(NamedTuple):
    """A model and its tokenizer (None where the checkpoint has none)."""

    model: nn.Module
    tokenizer: Any


def load(
    name_or_path: str,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = torch.float32,
    revision: str | None = None,
    **hf_kwargs: Any,
) -> Loaded:
    """Load the text model of a checkpoint. No code from the checkpoint is run, and only safetensors are read.

    Published Qwen3.5 checkpoints carry a multimodal configuration; their text model is what is loaded.
    """
    if hf_kwargs.get("trust_remote_code"):
        raise ValueError("trust_remote_code is not supported: hookpoints runs no code from a checkpoint")
    source = str(embedded.path(name_or_path)) if name_or_path in embedded.names() else name_or_path
    config = AutoConfig.from_pretrained(source, revision=revision)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedModelError(
            f"{name_or_path!r} is a {config.model_type!r} checkpoint, which has no causal language model"
        )
    model: Any = AutoModelForCausalLM.from_pretrained(
        source, revision=revision, dtype=dtype, use_safetensors=True, **hf_kwargs
    )
    if hf_kwargs.get("device_map") is None:
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Loaded(model, _tokenizer(source, revision))


def _tokenizer(source: str, revision: str | None) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError, KeyError):
        return None  # methods that need one say so
