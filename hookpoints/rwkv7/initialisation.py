"""Initial weights of RWKV-7, as the official training code and flash-linear-attention have them.

Channels differ from the start: the first channels of the first heads shift little and decay slowly, the last ones much
and fast, and all the more so in higher layers. So slow heads exist before anything is learnt.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hookpoints.rwkv7.configuration import RWKV7Config
from hookpoints.rwkv7.layers import LowRank, RWKV7Attention, RWKV7FeedForward

_POWERS = {"x_r": 0.2, "x_w": 0.9, "x_k": 0.7, "x_v": 0.7, "x_a": 0.9, "x_g": 0.2}
"""Exponents of the token shifts: the larger, the more a channel looks at the token before."""


def initialise(module: nn.Module, config: RWKV7Config) -> None:
    """Set the weights of one module, its own parameters and those that its kind decides over."""
    if isinstance(module, LowRank):
        inner, outer = module.lora[0], module.lora[2]
        assert isinstance(inner, nn.Linear) and isinstance(outer, nn.Linear)
        init.zeros_(inner.weight)
        tall = outer.weight.shape[0] / outer.weight.shape[1]
        init.orthogonal_(outer.weight, gain=0.1 * max(1.0, tall**-0.5))
        if outer.bias is not None:
            init.zeros_(outer.bias)
    elif isinstance(module, RWKV7Attention):
        _attention(module, config)
    elif isinstance(module, RWKV7FeedForward):
        init.copy_(module.x_k, 1 - _ramp(config.hidden_size) ** (_above(module.layer_idx, config) ** 4))
        init.orthogonal_(module.key.weight)
        init.zeros_(module.value.weight)


def _attention(module: RWKV7Attention, config: RWKV7Config) -> None:
    layer, width = module.layer_idx, config.hidden_size
    for name, power in _POWERS.items():
        init.copy_(getattr(module, name), (1 - _ramp(width) ** (power * _above(layer, config))).view(1, 1, -1))
    centred = torch.linspace(-0.5, 0.5, width)
    inside = torch.linspace(-1, 1, module.head_dim).repeat(module.num_heads)
    zigzag = inside * inside.abs()
    depth = layer / max(1, config.num_hidden_layers - 1)
    slow_to_fast = -6 + 6 * torch.linspace(0, 1, width) ** (1 + depth**0.3)
    _bias(module.w_lora, slow_to_fast + 0.5 + 2.5 * zigzag)
    _bias(module.a_lora, -0.19 + 0.3 * zigzag + 0.4 * centred)
    if layer:
        values = module.v_proj.out_features
        _bias(module.v_lora, 0.73 - 0.4 * torch.linspace(-0.5, 0.5, values))
    init.copy_(module.k_k, 0.71 - 0.1 * centred)
    init.constant_(module.k_a, 1.02)
    init.constant_(module.r_k, -0.04)
    init.constant_(module.g_norm.weight, ((layer + 1) / config.num_hidden_layers) ** 0.7)
    init.zeros_(module.g_norm.bias)
    init.orthogonal_(module.r_proj.weight)
    init.orthogonal_(module.k_proj.weight, gain=0.1)
    init.orthogonal_(module.v_proj.weight)
    bound = 1 / math.sqrt(module.o_proj.in_features * 2 * config.num_hidden_layers)
    init.uniform_(module.o_proj.weight, -bound, bound)


def _ramp(width: int) -> Tensor:
    return torch.arange(width) / width


def _above(layer: int, config: RWKV7Config) -> float:
    """Share of the layers from this one up: 1 at the bottom, nearly 0 at the top."""
    return 1 - layer / config.num_hidden_layers


def _bias(module: LowRank, value: Tensor) -> None:
    bias = module.lora[2].bias
    assert isinstance(bias, Tensor)
    init.copy_(bias, value)
