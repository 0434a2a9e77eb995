"""An independent implementation of RWKV-7, given the weights of ours: the official package `rwkv`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hookpoints.rwkv7 import RWKV7ForCausalLM
from hookpoints.rwkv7.official import _official_name


class Answer(NamedTuple):
    """What an oracle makes of a sequence."""

    logits: Tensor
    """[T,vocab]."""
    states: list[Tensor]
    """[H,K,V] of each layer after the last token, key-first."""


def official_weights(model: RWKV7ForCausalLM) -> dict[str, Tensor]:
    """The weights under the names and in the orientation of the official checkpoints (BlinkDL's .pth), which the
    official package checks."""
    weights = {}
    for name, value in model.state_dict().items():
        is_turned = ".lora." in name and name.endswith("weight")
        weights[_official_name(name)] = value.T.contiguous() if is_turned else value
    return weights


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
