"""What is read of an edited run: divergences, log-probabilities, bits.

Each readout gives one value per trial. `Lab.read` calls it with the logits of a batch (`lab.EditedRows`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from writesae.experiment.lab import EditedRows, Readout
from writesae.experiment.readout import divergences
from writesae_study.head.writes import nats


def kl_window(rows: EditedRows) -> Mapping[str, NDArray[np.float64]]:
    """`kl`: KL(native || edited) in nats, mean over the window."""
    kl = divergences(rows.native, rows.positions, rows.window).forward
    return {"kl": kl.mean(1).numpy()}


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
