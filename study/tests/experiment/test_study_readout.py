"""Columns that are read of edited runs, against sums by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hookpoints import WriteEdit
from writesae.experiment.lab import EditedRows, Trial
from writesae_study.experiment.readout import KL_METRICS, added_bits, kl_metrics

T, D = 9, 11


def rows(start: int = 2, width: int = 4) -> EditedRows:
    """Trials at tokens 2 and 4 of a sequence, run to its end."""
    g = torch.Generator().manual_seed(3)
    trials = [Trial({}, position, WriteEdit(0, 0, position, mode="delete")) for position in (2, 4)]
    logits = torch.randn(2, T - start, D, generator=g, dtype=torch.float64)
    return EditedRows(trials, torch.randn(T, D, generator=g, dtype=torch.float64), logits, start, width, None)


def kl_by_hand(batch: EditedRows, n: int, t: int, reverse: bool = False) -> float:
    p, q = (x.softmax(-1) for x in (batch.native[t], batch.logits[n, t - batch.start]))
    p, q = (q, p) if reverse else (p, q)
    return float((p * (p / q).log()).sum())


@pytest.mark.parametrize("prefix", ["", "reverse_"])
def test_columns_are_of_their_tokens_and_direction(prefix: str) -> None:
    batch = rows()
    table = kl_metrics(batch)
    assert table.keys() == KL_METRICS.keys()
    for n, t in enumerate((2, 4)):
        at, after, *rest = (kl_by_hand(batch, n, t + s, bool(prefix)) for s in range(4))
        found = [table[f"{prefix}kl_{name}"][n] for name in ("at", "next", "window")]
        assert found == pytest.approx([at, after, np.mean([at, after, *rest])], rel=1e-10)


def test_added_bits_are_those_of_the_whole_sequence() -> None:
    batch, tokens = rows(), torch.arange(T) % D
    edited = torch.cat([batch.native[:2], batch.logits[0]])
    costs = [-x[:-1].log_softmax(-1)[torch.arange(T - 1), tokens[1:]].mean() for x in (edited, batch.native)]
    found = added_bits(tokens)(batch)["bits"]
    assert float(np.asarray(found)[0]) == pytest.approx(float(costs[0] - costs[1]) / math.log(2), abs=1e-5)
