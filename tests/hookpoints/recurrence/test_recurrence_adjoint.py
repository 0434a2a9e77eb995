"""Gradients of every write from the gradients of the reads, against autograd through the step-by-step reference."""

from __future__ import annotations

import pytest
import torch
from recurrences import FORMS, random_recurrence

from hookpoints.recurrence import Method, Recurrence


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_autograd(r: Recurrence, g: torch.Tensor) -> torch.Tensor:
    """dL/dW [B,T,H,K,V] for L = <g, o>, with each write given as its K rank-1 rows, so that all of it can vary."""
    dense = r.write().detach().requires_grad_()
    rows = torch.eye(r.K, dtype=r.dtype).expand(r.B, r.T, r.H, r.K, r.K)
    outputs = r.with_write(rows, dense).outputs(method="reference")
    return torch.autograd.grad((outputs * g).sum(), dense)[0]


@pytest.mark.parametrize("declare_beta", [True, False])
@pytest.mark.parametrize("method", ["chunked", "reference"])
@pytest.mark.parametrize("form", FORMS)
def test_write_gradients_are_those_of_autograd(form: str, method: Method, declare_beta: bool) -> None:
    r = random_recurrence(form, B=2, T=37, dtype=torch.float64, initial_state=True, declare_beta=declare_beta)
    g = normal(r.B, r.T, r.H, r.V)
    found = r.write_gradients(g, method=method)
    torch.testing.assert_close(found, by_autograd(r, g), rtol=1e-10, atol=1e-10)
    some = r.write_gradients(g, heads=1, positions=[5, -1, 5], method=method)
    torch.testing.assert_close(some, found[:, [5, 36, 5], 1:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["chunked", "reference"])
@pytest.mark.parametrize("form", FORMS)
def test_value_gradients_are_those_of_autograd(form: str, method: Method) -> None:
    r = random_recurrence(form, B=2, T=37, dtype=torch.float64, initial_state=True)
    g, u = normal(r.B, r.T, r.H, r.V), r.u.clone().requires_grad_()
    (expected,) = torch.autograd.grad((r.replace(u=u).outputs(method="reference") * g).sum(), u)
    torch.testing.assert_close(r.value_gradients(g, method=method), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_write_gradients_in_float32(form: str) -> None:
    exact = random_recurrence(form, B=2, T=70, dtype=torch.float64, seed=3)
    names = [name for name in ("q", "k", "u", "log_decay", "a", "b", "beta") if getattr(exact, name) is not None]
    r = exact.replace(**{name: getattr(exact, name).float() for name in names})
    g = normal(r.B, r.T, r.H, r.V)
    found = r.write_gradients(g.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), by_autograd(exact, g), rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("method", ["chunked", "reference"])
@pytest.mark.parametrize("form", FORMS)
def test_blocks_are_the_states(form: str, method: Method) -> None:
    r = random_recurrence(form, B=2, T=37, dtype=torch.float64, initial_state=True)
    blocks = list(r.state_blocks(method=method))
    assert max(block.shape[1] for block in blocks) <= 16
    torch.testing.assert_close(torch.cat(blocks, 1), r.states(method="reference"), rtol=1e-10, atol=1e-10)


def test_the_open_loop_leaves_the_erase_out() -> None:
    r = random_recurrence("gdn", T=20, dtype=torch.float64)
    g = normal(r.B, r.T, r.H, r.V)
    opened = r.without_erase()
    torch.testing.assert_close(opened.write_gradients(g), by_autograd(opened, g), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(opened.write_gradients(g), r.write_gradients(g))


def test_an_edit_changes_reads_as_its_gradient_says() -> None:
    """The adjoint against `propagate`, the forward half of the same linear map."""
    r = random_recurrence("rwkv7", T=24, H=1, dtype=torch.float64)
    g, key, value = normal(1, 24, 1, r.V), normal(1, r.K, seed=1), normal(r.V, seed=2)
    carried = r.propagate(key, 7, 0)[0, 0]
    weights = (carried * r.q[0, 7:, 0]).sum(-1) * r.scale
    expected = (weights[:, None] * value * g[0, 7:, 0]).sum()
    gradient = r.write_gradients(g, positions=7)[0, 0, 0]
    torch.testing.assert_close(key[0] @ gradient @ value, expected, rtol=1e-10, atol=1e-10)


def test_wrong_shapes_are_named() -> None:
    r = random_recurrence("gdn", T=5)
    with pytest.raises(ValueError, match="read_gradients"):
        r.adjoint(torch.zeros(1, 5, 2, 7))
