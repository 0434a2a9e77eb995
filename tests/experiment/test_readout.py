"""Readouts of edited runs against torch's own divergences, and their limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div

from hookpoints import WriteEdit
from writesae.experiment import readout
from writesae.experiment.lab import EditedRows, Trial
from writesae.experiment.readout import KL_METRICS, added_bits, divergences, kl_metrics, kl_window

T, N, P, D = 9, 4, 3, 11


@pytest.mark.parametrize("block", [16_000_000, 5 * D])
def test_both_directions_are_those_of_torch(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(readout, "_BLOCK_FLOATS", block)  # the second size cuts through rows
    g = torch.Generator().manual_seed(0)
    native, edited = 3 * torch.randn(T, D, generator=g), 3 * torch.randn(N, P, D, generator=g)
    positions = torch.randint(0, T, (N, P), generator=g)
    both = divergences(native, positions, edited)
    log_p, log_q = native[positions].double().log_softmax(-1), edited.double().log_softmax(-1)
    forward = kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    reverse = kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(both.forward, forward, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(both.reverse, reverse, rtol=1e-12, atol=1e-14)
    half = divergences(native.bfloat16(), positions, edited.bfloat16())  # widened before the softmax
    torch.testing.assert_close(half, divergences(native.bfloat16().double(), positions, edited.bfloat16().double()))


def test_equal_logits_are_exactly_zero_apart_and_shifts_do_not_count() -> None:
    native = torch.randn(T, D)
    positions = torch.tensor([[0, 4, 8]])
    assert divergences(native, positions, native[positions]).forward.tolist() == [[0, 0, 0]]
    shifted = divergences(native, positions, native[positions] + 2)
    assert shifted.forward.max() < 1e-12 and (shifted.reverse >= 0).all()


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


def test_windows_are_each_trials_own() -> None:
    batch = rows()
    assert batch.positions.tolist() == [[2, 3, 4, 5], [4, 5, 6, 7]]
    assert torch.equal(batch.window[1], batch.logits[1, 2:6]) and torch.equal(batch.native_window[1], batch.native[4:8])
    table = kl_window(batch)
    for n, t in enumerate((2, 4)):
        assert table["kl"][n] == pytest.approx(np.mean([kl_by_hand(batch, n, t + s) for s in range(4)]), rel=1e-10)
        assert table["kl_at"][n] == pytest.approx(kl_by_hand(batch, n, t), rel=1e-10)


def test_added_bits_are_those_of_the_whole_sequence() -> None:
    batch, tokens = rows(), torch.arange(T) % D
    edited = torch.cat([batch.native[:2], batch.logits[0]])
    costs = [-x[:-1].log_softmax(-1)[torch.arange(T - 1), tokens[1:]].mean() for x in (edited, batch.native)]
    found = added_bits(tokens)(batch)["bits"]
    assert float(np.asarray(found)[0]) == pytest.approx(float(costs[0] - costs[1]) / math.log(2), abs=1e-5)
