"""SAELens alone: what its store reads from a Hugging Face model."""

from __future__ import annotations

from typing import Any, cast

import torch
from datasets import Dataset
from sae_lens.load_model import HookedProxyLM
from sae_lens.training.activations_store import ActivationsStore
from tool_probes.truth import LAYER
from torch import Tensor


def stored(model: Any, hook: str, d_in: int, tokens: Tensor, **model_kwargs: bool) -> Tensor:
    """[B,T,d_in] what SAELens' trainer is fed with from ``hook``."""
    store = ActivationsStore(
        model,
        Dataset.from_dict({"tokens": tokens.tolist()}),
        streaming=False,
        hook_name=hook,
        hook_head_index=None,
        context_size=tokens.shape[1],
        d_in=d_in,
        n_batches_in_buffer=2,
        total_training_tokens=tokens.numel(),
        store_batch_size_prompts=1,
        train_batch_size_tokens=8,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        model_kwargs=model_kwargs,
    )
    return store.get_activations(tokens)


class SAELens:
    """A hook is a module's output, and no module returns the write: the op that has it is a function."""

    def __init__(self, model: Any):
        self.model = model

    def _sae(self, tokens: Tensor, op: str) -> Tensor:
        model = HookedProxyLM(self.model, cast(Any, None), hook_names=[op])
        return stored(model, op, 1, tokens)


class Mamba2(SAELens):
    def sae(self, tokens: Tensor) -> Tensor:
        return self._sae(tokens, f"backbone.layers.{LAYER}.mixer.mamba2_chunk_scan")


class GatedDelta(SAELens):
    def sae(self, tokens: Tensor) -> Tensor:
        return self._sae(tokens, f"model.layers.{LAYER}.linear_attn.torch_chunk_gated_delta_rule")


class RWKV7(SAELens):
    def sae(self, tokens: Tensor) -> Tensor:
        return self._sae(tokens, f"model.layers.{LAYER}.attn.rwkv7_recurrence")


PROBES = {"mamba2": Mamba2, "qwen3_5": GatedDelta, "rwkv7": RWKV7}
