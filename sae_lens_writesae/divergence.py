"""KL divergences between native and patched predictions at chosen positions, in float64 and little memory."""

from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK_FLOATS = 16_000_000  # logits widened at once: 128 MB in float64


class Divergences(NamedTuple):
    """Per row and position, in nats. Exactly 0 where both distributions are equal."""

    forward: Tensor  # [N,P] KL(native || patched), the headline direction
    reverse: Tensor  # [N,P] KL(patched || native)


def divergences(native: Tensor, positions: Tensor, patched: Tensor) -> Divergences:
    """Both KL divergences of next-token distributions at chosen positions of edited runs of one sequence.

    Widened to float64 (float32 where the device has none) block by block, so that memory beyond the inputs stays
    about 0.5 GB at any vocabulary. Rounding can leave a divergence of -1e-16; it is returned as 0.

    Args:
        native: [T,D] logits of the plain run.
        positions: [N,P] where in the sequence; what rows share is widened once.
        patched: [N,P,D] logits of edited run n at positions[n].
    """
    wide = torch.float32 if patched.device.type == "mps" else torch.float64
    distinct, which = positions.unique(return_inverse=True)
    log_native = native[distinct].to(wide).log_softmax(-1)
    share_native = log_native.exp()
    which, rows = which.flatten(), patched.flatten(0, 1)
    forward, reverse = (torch.empty(len(rows), dtype=wide) for _ in range(2))
    step = max(1, _BLOCK_FLOATS // patched.shape[-1])
    for i in range(0, len(rows), step):
        at, log_patched = which[i : i + step], rows[i : i + step].to(wide).log_softmax(-1)
        gap = log_native[at] - log_patched
        forward[i : i + step] = torch.linalg.vecdot(share_native[at], gap).cpu()
        reverse[i : i + step] = -torch.linalg.vecdot(log_patched.exp_(), gap).cpu()
    return Divergences(forward.clamp_min(0).view(positions.shape), reverse.clamp_min(0).view(positions.shape))
