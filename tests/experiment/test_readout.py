"""Readouts of edited runs against torch's own divergences, and their limits."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import kl_div

from writesae.experiment import readout
from writesae.experiment.readout import divergences

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
