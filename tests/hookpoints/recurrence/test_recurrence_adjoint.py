"""Gradients of every write from the gradients of the reads, against autograd through the step-by-step reference."""

from __future__ import annotations

import pytest
import torch
from recurrences import FORMS, normal, random_recurrence

from hookpoints.recurrence import Method, Recurrence


def by_autograd(r: Recurrence, g: torch.Tensor) -> torch.Tensor:
    """dL/dW [B,T,H,K,V] for L = <g, o>, with each write given as its K rank-1 rows, so that all of it can vary."""
    dense = r.write().detach().requires_grad_()
    rows = torch.eye(r.K, dtype=r.dtype).expand(r.B, r.T, r.H, r.K, r.K)
    outputs = r.with_write(rows, dense).outputs(method="reference")
    return torch.autograd.grad((outputs * g).sum(), dense)[0]


@pytest.mark.parametrize("declare_beta", [True, False])
@pytest.mark.parametrize("method", ["chunked", "reference"])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_writes_and_values_are_those_of_autograd(form: str, method: Method, declare_beta: bool) -> None:
    r = random_recurrence(form, B=2, T=37, dtype=torch.float64, initial_state=True, declare_beta=declare_beta)
    g, u = normal(r.B, r.T, r.H, r.V), r.u.clone().requires_grad_()
    found = r.adjoint(g).states(method=method).flip(1)
    torch.testing.assert_close(found, by_autograd(r, g), rtol=1e-10, atol=1e-10)
    (expected,) = torch.autograd.grad((r.replace(u=u).outputs(method="reference") * g).sum(), u)
    torch.testing.assert_close(r.value_gradients(g, method=method), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ["chunked", "reference"])
@pytest.mark.parametrize("form", FORMS)
def test_blocks_are_the_states(form: str, method: Method) -> None:
    r = random_recurrence(form, B=2, T=37, dtype=torch.float64, initial_state=True)
    blocks = list(r.state_blocks(method=method))
    assert max(block.shape[1] for block in blocks) <= 16
    torch.testing.assert_close(torch.cat(blocks, 1), r.states(method="reference"), rtol=1e-10, atol=1e-10)
