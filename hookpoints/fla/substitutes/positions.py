"""Rotary embeddings and token shift in plain torch, for whole and for packed sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hookpoints.fla.substitutes.numbers import sequences, working_dtype


def rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Any = None,
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
    chunk_indices: Any = None,
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
