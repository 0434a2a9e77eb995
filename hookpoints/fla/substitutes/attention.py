"""flash_attn's two functions by torch's scaled dot product attention, for the softmax layers of fla's hybrids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hookpoints.fla.substitutes.numbers import sequences

Window = tuple[int, int]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    **_: Any,
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
