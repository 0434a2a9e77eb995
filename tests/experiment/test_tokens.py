"""How long work on texts is said to take."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hookpoints import HookedRecurrent
from writesae.experiment import tokens as module


def test_a_pass_is_over_one_sequence(
    model: HookedRecurrent, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two take two seconds."""
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=iter((0.0, 2.0)).__next__))
    lines: list[str] = []
    module.say_time(model, tokens[:2], 15, Path("here"), lines.append)
    assert lines[0].startswith("about 15 s")
