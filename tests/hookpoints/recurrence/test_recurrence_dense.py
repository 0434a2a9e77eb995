"""Dense writes: chunks against the reference."""

from __future__ import annotations

import pytest
import torch
from recurrences import FORMS, random_recurrence
from torch.testing import assert_close

from hookpoints.recurrence import dense, reference


@pytest.mark.parametrize("tokens, wide", [(3, False), (16, False), (70, False), (16, True)])
@pytest.mark.parametrize("declare_beta", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_chunks_are_the_reference(form: str, declare_beta: bool, tokens: int, wide: bool, monkeypatch) -> None:
    r = random_recurrence(form, B=2, T=tokens, dtype=torch.float64, initial_state=True, declare_beta=declare_beta)
    writes = torch.randn(*r.q.shape, r.V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    monkeypatch.setattr(dense, "_NUMBERS", 1)  # rows one by one
    monkeypatch.setattr(dense, "_LOOPED", 1)  # and tokens, where they are looped over
    monkeypatch.setattr(dense, "_BLOCK", 40)
    monkeypatch.setattr(dense, "_WIDE", {"cpu": 0} if wide else {})  # a loop over tokens, or chunks
    expected = tuple(reference.scan(r, writes))
    assert_close(tuple(dense.scan_with(r, lambda rows, tokens: writes[rows, tokens])), expected, rtol=0, atol=1e-10)
