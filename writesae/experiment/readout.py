"""What is read of an edited run: divergences, log-probabilities, bits.

Each readout gives one value per trial. `Lab.read` calls it with the logits of a batch (`lab.EditedRows`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK_FLOATS = 2**18
"""Logits widened at once: 2 MB in float64, which stay in a cache (a third of the time of 128 MB)."""


class Divergences(NamedTuple):
    """Per row and position, in nats. Exactly 0 where both distributions are equal."""

    forward: Tensor
    """[N,P] KL(native || edited), the headline direction."""
    reverse: Tensor
    """[N,P] KL(edited || native)."""


def divergences(native: Tensor, positions: Tensor, edited: Tensor) -> Divergences:
    """Both KL divergences of next-token distributions at some positions of edited runs of one sequence.

    Computed in float64 (float32 where the device has none), block by block of a few MB. Rounding can leave a
    divergence of -1e-16; it is returned as 0.

    Args:
        native: [T,vocab] logits of the plain run.
        positions: [N,P] where in the sequence, best on the host; what rows share is widened once.
        edited: [N,P,vocab] logits of edited run n at positions[n].
    """
    wide = torch.float32 if edited.device.type == "mps" else torch.float64
    # Trials of one sequence share most of their window, and a softmax over the vocabulary is what costs.
    distinct, which = positions.unique(return_inverse=True)
    log_native = native[distinct].to(wide).log_softmax(-1)
    share_native = log_native.exp()
    which = which.flatten().to(native.device)
    rows = edited.flatten(0, 1)
    both = torch.empty(2, len(rows), dtype=wide, device=edited.device)
    step = max(1, _BLOCK_FLOATS // edited.shape[-1])
    for i in range(0, len(rows), step):
        block = slice(i, i + step)
        log_edited = rows[block].to(wide).log_softmax(-1)
        gap = log_native[which[block]] - log_edited
        both[0, block] = torch.linalg.vecdot(share_native[which[block]], gap)
        both[1, block] = -torch.linalg.vecdot(log_edited.exp_(), gap)  # in place: read last
    return Divergences(*both.clamp_min_(0).cpu().view(2, *positions.shape))
