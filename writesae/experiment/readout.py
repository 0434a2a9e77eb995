"""What is read of an edited run: divergences, log-probabilities, bits.

Each readout gives one value per trial. `Lab.read` calls it with the logits of a batch (`lab.EditedRows`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from writesae.experiment.lab import EditedRows, Readout
from writesae.head.upper import nats

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


_KL = {
    "kl_window": "nats, mean over t..t+horizon of KL(native || edited)",
    "kl_at": "nats, at t",
    "kl_next": "nats, at t + 1",
}
KL_METRICS: dict[str, str] = _KL | {f"reverse_{name}": "the same for KL(edited || native)" for name in _KL}
"""Columns of `kl_metrics`."""


def kl_metrics(rows: EditedRows) -> Mapping[str, NDArray[np.float64]]:
    """KL at t, at t + 1, and the mean over the window, in both directions."""
    forward, reverse = divergences(rows.native, rows.positions, rows.window)
    columns: dict[str, NDArray[np.float64]] = {}
    for direction, kl in {"": forward, "reverse_": reverse}.items():
        columns[f"{direction}kl_window"] = kl.mean(1).numpy()
        columns[f"{direction}kl_at"] = kl[:, 0].numpy()
        columns[f"{direction}kl_next"] = kl[:, 1].numpy()
    return columns


def kl_window(rows: EditedRows) -> Mapping[str, NDArray[np.float64]]:
    """`kl`: KL(native || edited) in nats, mean over the window; `kl_at`: at its first token."""
    kl = divergences(rows.native, rows.positions, rows.window).forward
    return {"kl": kl.mean(1).numpy(), "kl_at": kl[:, 0].numpy()}


def native_log_prob(rows: EditedRows) -> Tensor:
    """Mean over the window of log p without edits: [n,vocab], float32, nats."""
    return rows.native_window.float().log_softmax(-1).mean(1)


def log_prob_change(rows: EditedRows) -> Tensor:
    """Mean over the window of log p(edited) - log p(native): [n,vocab], float32, nats."""
    return rows.window.float().log_softmax(-1).mean(1) - native_log_prob(rows)


def bits_per_token(logits: Tensor, tokens: Tensor) -> float:
    """Mean of -log2 p(next token) over a sequence: logits [T,vocab], tokens [T]."""
    return nats(logits, tokens) / math.log(2)


def added_bits(tokens: Tensor) -> Readout:
    """`bits`: bits per token of the whole sequence `tokens` [T], more than without edits. Runs must go to the end."""

    def read(rows: EditedRows) -> Mapping[str, NDArray[np.float64]]:
        plain = bits_per_token(rows.native, tokens)
        before = rows.native[: rows.start]
        bits = [bits_per_token(torch.cat([before, logits]), tokens) for logits in rows.logits]
        return {"bits": np.array(bits) - plain}

    return read
