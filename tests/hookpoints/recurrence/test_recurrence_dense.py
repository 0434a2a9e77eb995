"""Dense writes: chunks against a loop over tokens."""

from __future__ import annotations

import pytest
import torch
from recurrences import FORMS, random_recurrence
from torch.testing import assert_close

from hookpoints.recurrence import Recurrence, dense, reference


def by_token(r: Recurrence, writes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The oracle: the state's own matrix of a transition, built from its definition, and one write after another."""
    state, outputs = r.starting_state(), []
    for t in range(r.T):
        decay = (
            torch.ones_like(state)
            if r.log_decay is None
            else r.log_decay[:, t].exp().reshape(*r.k.shape[:1], r.H, -1, 1)
        )
        moved = state * decay
        for a, b in [] if r.b is None else zip(*(x[:, t].reshape(r.B, r.H, -1, r.K).unbind(2) for x in (r.a, r.b))):
            moved = moved + a[..., None] * (b[..., None, :] @ state)
        before, state = state, moved + writes[:, t]
        outputs.append(torch.einsum("bhk,bhkv->bhv", r.scale * r.q[:, t], before if r.read_before_write else state))
    return torch.stack(outputs, 1), state


@pytest.mark.parametrize("tokens, wide", [(3, False), (16, False), (70, False), (16, True)])
@pytest.mark.parametrize("declare_beta", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_chunks_are_the_loop(form: str, declare_beta: bool, tokens: int, wide: bool, monkeypatch) -> None:
    r = random_recurrence(form, B=2, T=tokens, dtype=torch.float64, initial_state=True, declare_beta=declare_beta)
    writes = torch.randn(*r.q.shape, r.V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    monkeypatch.setattr(dense, "_NUMBERS", 1)  # rows one by one
    monkeypatch.setattr(dense, "_LOOPED", 1)  # and tokens, where they are looped over
    monkeypatch.setattr(dense, "_BLOCK", 40)
    monkeypatch.setattr(dense, "_WIDE", {"cpu": 0} if wide else {})  # a loop over tokens, or chunks
    expected = by_token(r, writes)
    assert_close(tuple(dense.scan_with(r, lambda rows, tokens: writes[rows, tokens])), expected, rtol=0, atol=1e-10)
    assert_close(list(reference.steps(r, writes))[-1][1], expected[1], rtol=0, atol=1e-10)
