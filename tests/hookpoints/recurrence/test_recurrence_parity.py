"""float32 near the float64 truth, where it is hard."""

from __future__ import annotations

import pytest
import torch
from recurrences import FORMS, normal, random_recurrence
from torch.nn import functional as F

from hookpoints.recurrence import Recurrence


def off(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative error in the root mean square."""
    return float((ours - exact).norm() / exact.norm())


def lifted(r: Recurrence) -> Recurrence:
    """The same numbers in float64."""
    return r.replace(q=r.q.double()).working()


@pytest.mark.parametrize("strongest_decay", [1e-3, 1.0, 100.0, 1000.0])
@pytest.mark.parametrize("form", FORMS)
def test_float32_is_near_the_float64_reference(form: str, strongest_decay: float) -> None:
    r = random_recurrence(form, T=300, K=32, V=16, most_beta=2.0, strongest_decay=strongest_decay, initial_state=True)
    exact = lifted(r)
    ours, truth = r.scan(), exact.scan(method="reference")
    assert ours.outputs.dtype == torch.float32
    assert off(ours.outputs, truth.outputs) < 1e-6
    assert off(ours.final_state, truth.final_state) < 1e-6
    assert off(r.states(1, slice(None, None, 7)), exact.states(1, slice(None, None, 7), method="reference")) < 1e-6


@pytest.mark.parametrize("declare_beta", [True, False])
@pytest.mark.parametrize("form", ["deltanet", "gdn", "kda"])
@pytest.mark.parametrize("spread", [1e-3, 1e-1])
def test_nearly_equal_keys_with_beta_near_two(form: str, declare_beta: bool, spread: float) -> None:
    """The erase is then nearly a reflection, again and again the same: the hardest solve there is."""
    r = random_recurrence(form, T=512, K=64, V=32, strongest_decay=1e-3)
    k = F.normalize(
        F.normalize(normal(1, 1, 2, 64), dim=-1) + spread / 8 * normal(1, 512, 2, 64, seed=1), dim=-1
    ).float()
    beta = torch.full((1, 512, 2), 1.99)
    b = k if r.log_decay is None else k * (r.log_decay if form == "kda" else r.log_decay[..., None]).exp()
    r = r.replace(k=k, beta=beta, b=b)
    exact = lifted(r).outputs(method="reference")
    solved = r if declare_beta else r.replace(a=r.a)
    assert (solved.beta is not None) == declare_beta
    assert off(solved.outputs(), exact) < 1e-5


@pytest.mark.parametrize("form", ["gdn", "kda", "gla", "mamba2", "rwkv7"])
@pytest.mark.parametrize("strength", [-1000.0, -torch.inf])
@pytest.mark.parametrize("where", ["one token", "some", "all"])
def test_resets_are_exact_and_leave_no_nan(form: str, strength: float, where: str) -> None:
    r = random_recurrence(form, T=90, K=8, V=6, initial_state=True, dtype=torch.float64)
    assert r.log_decay is not None
    log_decay = torch.zeros_like(r.log_decay)
    hit = {"one token": torch.arange(90) == 40, "some": torch.arange(90) % 5 < 2, "all": torch.arange(90) >= 0}
    log_decay[:, hit[where]] = strength
    b = r.b
    if form in ("gdn", "kda"):
        b = r.k * (log_decay if form == "kda" else log_decay[..., None]).exp()
    factors = {"log_decay": log_decay} if b is None else {"log_decay": log_decay, "b": b}
    leaves = {name: x.clone().requires_grad_() for name, x in factors.items()}
    r = r.replace(**leaves)
    ours, truth = r.scan(), r.scan(method="reference")
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)
    slopes = [torch.autograd.grad(scan.outputs.square().sum(), list(leaves.values())) for scan in (ours, truth)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-9, atol=1e-9)
    x = normal(2, 8)
    torch.testing.assert_close(r.propagate(x, 3, 0), r.propagate(x, 3, 0, method="reference"))
