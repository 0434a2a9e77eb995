"""The published reversal model, where its file is: it answers as its authors say, and its memory holds the digits."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
sys.path.append(str(ROOT / "tools"))

import reversal  # noqa: E402 (a script)

FILE = Path(os.environ.get("RWKV7_REVERSE") or ROOT.parent / "shared" / "data" / "rwkv7_reverse" / "only_rwkv7.pth")
pytestmark = pytest.mark.skipif(not FILE.is_file(), reason="RWKV7_REVERSE names no only_rwkv7.pth")


@pytest.fixture(scope="module")
def model():
    return reversal.load(FILE)


@torch.no_grad()
@pytest.mark.parametrize("step", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_every_digit_is_right(model, step):
    """With step 1 those of 10 numbers of each length up to 60, and their ends: 18,900 tokens."""
    generator = torch.Generator().manual_seed(0)
    for length in range(1, 61, step):
        text = reversal.spell(reversal.draw(10, length + 1, generator)[0][:, :length])
        assert torch.equal(model(text[:, :-1])[:, length:].argmax(-1), text[:, length + 1 :])


def test_a_digit_is_held_by_two_writes_of_a_head_in_short_numbers_and_by_four_in_long_ones(model):
    short, long = (reversal.draw(64, length, torch.Generator().manual_seed(1)) for length in (8, 32))
    one, two, four = [(1, 1, 1)], [(1, 1, 0), (1, 1, 1)], [(1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1)]
    assert min(reversal.exchange(model, *short, two)) > 0.98 > 0.9 > min(reversal.exchange(model, *short, one))
    assert min(reversal.exchange(model, *long, four)) > 0.98 > 0.95 > min(reversal.exchange(model, *long, two))
