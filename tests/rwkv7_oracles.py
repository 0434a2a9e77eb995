"""An independent implementation of RWKV-7, given the weights of ours: the official package `rwkv`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hookpoints.rwkv7 import RWKV7ForCausalLM

_BLOCK = {"pre_norm": "ln0", "attn_norm": "ln1", "ffn_norm": "ln2"}
_PROJECTIONS = {"r_proj": "receptance", "k_proj": "key", "v_proj": "value", "o_proj": "output", "g_norm": "ln_x"}
_OUTSIDE = {"model.embeddings": "emb", "model.norm": "ln_out", "lm_head": "head"}


class Answer(NamedTuple):
    """What an oracle makes of a sequence."""

    logits: Tensor
    """[T,vocab]."""
    states: list[Tensor]
    """[H,K,V] of each layer after the last token, key-first."""


def official_weights(model: RWKV7ForCausalLM) -> dict[str, Tensor]:
    """The weights under the names and in the orientation of the official checkpoints (BlinkDL's .pth)."""
    weights = {}
    for name, value in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        if module in _OUTSIDE:
            weights[f"{_OUTSIDE[module]}.{kind}"] = value
            continue
        layer, rest = name.removeprefix("model.layers.").split(".", 1)
        weights[f"blocks.{layer}.{_inside(rest)}"] = (
            value.T.contiguous() if ".lora." in name and kind == "weight" else value
        )
    return weights


def _inside(name: str) -> str:
    """Name of a parameter inside a block, translated."""
    head, _, rest = name.partition(".")
    if head in _BLOCK:
        return f"{_BLOCK[head]}.{rest}"
    if head == "ffn":
        return name
    first, _, last = rest.partition(".")
    if first.endswith("_lora"):  # w_lora.lora.0.weight -> w1, .2.weight -> w2, .2.bias -> w0
        return "att." + first[0] + {"lora.0.weight": "1", "lora.2.weight": "2", "lora.2.bias": "0"}[last]
    return f"att.{_PROJECTIONS[first]}.{last}" if first in _PROJECTIONS else f"att.{rest}"


def ask_official(
    model: RWKV7ForCausalLM,
    tokens: list[int],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    states: Path | None = None,
) -> Answer:
    """The official package, step by step. Its head norm knows heads of 64 alone; its states are value-first.

    It begins with those of a file, ``states``, as RWKV-Runner hands them to it: as they are, and token shifts of zero.
    """
    for name, value in {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}.items():
        monkeypatch.setenv(name, value)  # read at import
    module = importlib.import_module("rwkv.model")
    torch.save(official_weights(model), folder / "official.pth")
    oracle = module.RWKV(model=str(folder / "official"), strategy="cpu fp32")
    begin = None
    if states is not None:
        shift = torch.zeros(model.config.hidden_size)
        tuned = torch.load(states, weights_only=True)
        layers = range(model.config.num_hidden_layers)
        begin = [part for layer in layers for part in (shift, tuned[f"blocks.{layer}.att.time_state"].float(), shift)]
    logits, state = oracle.forward(tokens, begin, full_output=True)
    return Answer(logits, [part.mT for part in state[1::3]])
