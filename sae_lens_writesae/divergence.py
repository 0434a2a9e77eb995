"""KL divergences between native and patched predictions at chosen positions, in float64 and little memory."""

from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK_FLOATS = 16_000_000  # logits widened at once: 128 MB in float64


class Divergences(NamedTuple):
    """Per row and position, in nats. Exactly 0 where both distributions are equal."""

    forward: Tensor  # [N,P] KL(native || patched), the headline direction
    reverse: Tensor  # [N,P] KL(patched || native)


def divergences(native: Tensor, patched: Tensor) -> Divergences:
    """Both KL divergences of next-token distributions, from logits native [N,P,D] (or [P,D]) and patched
    [N,P,D].

    Widened to float64 (float32 where the device has none) block by block, so that memory beyond the inputs
    stays about 0.5 GB at any vocabulary. Rounding can leave a divergence of -1e-16; it is returned as 0.
    """
    native = native.expand_as(patched)
    n, p, vocabulary = patched.shape
    wide = torch.float32 if patched.device.type == "mps" else torch.float64
    forward, reverse = torch.empty(n * p, dtype=wide), torch.empty(n * p, dtype=wide)
    step = max(1, _BLOCK_FLOATS // vocabulary)
    for i in range(0, n * p, step):
        rows = torch.arange(i, min(i + step, n * p), device=patched.device)
        log_p = native[rows // p, rows % p].to(wide).log_softmax(-1)
        log_q = patched[rows // p, rows % p].to(wide).log_softmax(-1)
        gap = log_p - log_q
        forward[i : i + step] = (log_p.exp() * gap).sum(-1).cpu()
        reverse[i : i + step] = -(log_q.exp() * gap).sum(-1).cpu()
    return Divergences(forward.clamp_min(0).view(n, p), reverse.clamp_min(0).view(n, p))
