"""fla's short causal convolution in plain torch: whole sequences, packed sequences, and one token from a cache.

A cache [N,D,W] holds the last W inputs of each sequence, oldest first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hookpoints.fla.substitutes.numbers import sequences, working_dtype


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool | None = False,
    activation: str | None = None,
    backend: str | None = None,
    cu_seqlens: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """y_t = act(sum_w weight[:, w] x_{t-W+1+w} + bias) + residual_t, inputs before a sequence zero or from its cache.

    Args:
        x: [B,T,D], or [1, sum T, D] with ``cu_seqlens`` [N+1].
        weight: [D,W].
        initial_state: [N,D,W].

    Returns: y like x, and the cache [N,D,W] if asked for.
    """
    parts = [x] if cu_seqlens is None else [x[:, span] for span in sequences(cu_seqlens)]
    states = [initial_state] if cu_seqlens is None or initial_state is None else initial_state.split(1)
    done = [_convolve(part, weight, bias, activation, state) for part, state in _zip(parts, states)]
    y = torch.cat([y for y, _ in done], 1)
    if residual is not None:
        y = y + residual.to(y.dtype)
    final = torch.cat([state for _, state in done]).to(x.dtype) if output_final_state else None
    return y.to(x.dtype), final


def _zip(parts: list[Tensor], states: Any) -> list[tuple[Tensor, Tensor | None]]:
    return list(zip(parts, [*states, *[None] * (len(parts) - len(states))], strict=True))


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y [N,T,D] and the cache [N,D,W] of one stretch, both in the working dtype."""
    dtype, width = working_dtype(x), weight.shape[1]
    inputs = x.to(dtype).mT  # [N,D,T]
    before = inputs.new_zeros(*inputs.shape[:2], width) if state is None else state.to(dtype)
    inputs = torch.cat([before, inputs], -1)
    offset = None if bias is None else bias.to(dtype)
    y = F.conv1d(inputs[..., 1:], weight.to(dtype).unsqueeze(1), offset, groups=weight.shape[0]).mT
    return (F.silu(y) if activation in ("silu", "swish") else y), inputs[..., -width:]


def causal_conv1d_update(
    x: Tensor,
    cache: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One token per sequence: x [N,D], [1,N,D] or [N,1,D]. ``cache`` [N,D,W] is moved on in place, as fla does."""
    assert weight is not None, "fla's layers always give the convolution a weight"
    tokens = x.reshape(-1, 1, weight.shape[0])
    y, moved = _convolve(tokens, weight, bias, activation, cache)
    cache.copy_(moved)
    y = y.reshape(x.shape)
    return (y if residual is None else y + residual.reshape(x.shape).to(y.dtype)).to(x.dtype), cache
