"""What fla's kernels do along the sequence beside the recurrence, in plain torch: short convolutions, rotary
embeddings, token shift, softmax attention.

All of them take packed sequences as well: [1, sum T, ...] with the bounds ``cu_seqlens`` [N+1].
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hookpoints.fla.substitutes.pointwise import working_dtype

Window = tuple[int, int]
"""How many tokens before and after a query it may look at; -1 for all."""


def sequences(cu_seqlens: Tensor) -> Iterator[slice]:
    """Where each sequence lies on the time axis of a packed batch [1, sum T, ...]."""
    bounds = cu_seqlens.tolist()
    return (slice(start, stop) for start, stop in itertools.pairwise(bounds))


# -- short causal convolutions; a cache [N,D,W] holds the last W inputs of each sequence, oldest first


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
    **_: object,
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


def _zip(parts: list[Tensor], states: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor | None]]:
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


# -- rotary embeddings and token shift


def rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    chunk_indices: object = None,
) -> Tensor:
    """Rotate the first R channels of x by the angle of its position.

    Args:
        x: [B,T,H,D], or [1, sum T, H, D] with ``cu_seqlens``.
        cos, sin: [positions, R/2].
        seqlen_offsets: position of the first token, one for all or one per sequence [N]. Tokens whose position is
            not in the table (padding before a sequence) stay as they are.
    """
    where = _positions(x, seqlen_offsets, cu_seqlens)  # [B,T]
    known = ((where >= 0) & (where < len(cos)))[..., None, None]
    where, dtype = where.clamp(0, len(cos) - 1), working_dtype(x)
    c, s = (table[where].unsqueeze(2).to(dtype) for table in (cos, sin))  # [B,T,1,R/2]
    turned, rest = x[..., : 2 * c.shape[-1]].to(dtype), x[..., 2 * c.shape[-1] :]
    first, second = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    pair = (first * c - second * s, first * s + second * c)
    rotated = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    y = torch.where(known, torch.cat([rotated.to(x.dtype), rest], -1), x)
    return x.copy_(y) if inplace else y


def _positions(x: Tensor, offsets: int | Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[B,T] position of each token in its sequence."""
    if cu_seqlens is None:
        own = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        return own + (offsets[:, None] if isinstance(offsets, Tensor) else offsets)
    spans = list(sequences(cu_seqlens))
    starts = offsets.tolist() if isinstance(offsets, Tensor) else [offsets] * len(spans)
    return torch.cat(
        [torch.arange(span.stop - span.start, device=x.device) + s for span, s in zip(spans, starts, strict=True)]
    )[None]


def token_shift(
    x: Tensor,
    cu_seqlens: Tensor | None = None,
    cache: Tensor | None = None,
    output_cache: bool = False,
    chunk_indices: object = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """x_{t-1} - x_t; before a sequence stands its cache, or zero.

    Args:
        x: [B,T,D], or [1, sum T, D] with ``cu_seqlens``.
        cache: [N,D] (or [N,1,D]) last token of the stretch before.

    Returns: like x; with ``output_cache`` also the last token [N,D] of each sequence.
    """
    spans = [slice(0, x.shape[1])] if cu_seqlens is None else list(sequences(cu_seqlens))
    count = x.shape[0] if cu_seqlens is None else len(spans)
    before = x.new_zeros(count, x.shape[-1]) if cache is None else cache.reshape(count, -1).to(x.dtype)
    rows = [before] if cu_seqlens is None else before.split(1)
    shifted = [torch.cat([row.unsqueeze(1), x[:, span][:, :-1]], 1) for row, span in zip(rows, spans, strict=True)]
    out = torch.cat(shifted, 1) - x
    return (out, torch.cat([x[:, span.stop - 1] for span in spans])) if output_cache else out


# -- flash_attn's two functions, for the softmax layers of fla's hybrids


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    **_: object,
) -> Tensor:
    """Attention of q [B,T,H,D] over k, v [B,S,Hk,D]; the last query stands at the last key. Returns [B,T,H,D]."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2) if groups > 1 else x for x in (k, v))
    allowed = _allowed(q.shape[1], k.shape[1], causal, window_size, q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout_p, scale=softmax_scale)
    return out.transpose(1, 2)


def _allowed(queries: int, keys: int, causal: bool, window: Window, device: torch.device) -> Tensor:
    """[T,S], True where a query may look."""
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)
    left, right = window[0], 0 if causal else window[1]
    allowed = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if left >= 0:
        allowed &= key >= query - left
    return allowed & (key <= query + right) if right >= 0 else allowed


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any
) -> Tensor:
    """``flash_attn_func`` for packed sequences: q [sum T, H, D], k and v [sum S, Hk, D]."""
    for name in ("max_seqlen_q", "max_seqlen_k"):
        options.pop(name, None)
    spans = zip(sequences(cu_seqlens_q), sequences(cu_seqlens_k), strict=True)
    parts = [flash_attn_func(q[a][None], k[b][None], v[b][None], **options)[0] for a, b in spans]
    return torch.cat(parts)
