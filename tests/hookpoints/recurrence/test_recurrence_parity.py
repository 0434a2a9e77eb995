"""The same numbers as transformers' own torch ops, and float32 near the float64 truth."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from conftest import modelling
from recurrences import FORMS, random_recurrence
from torch.nn import functional as F
from transformers.models.mamba2 import modeling_mamba2 as mamba2
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

from hookpoints.recurrence import Recurrence

kimi = modelling("kimi_linear")
B, T, HK, H, K, V = 2, 100, 2, 4, 16, 12
# The oldest versions expand groups of heads before they call the op, not inside it.
HG = HK if "repeat_interleave" in inspect.unwrap(qwen.torch_chunk_gated_delta_rule).__code__.co_names else H


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def off(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative error in the root mean square."""
    return float((found - exact).norm() / exact.norm())


def lifted(r: Recurrence) -> Recurrence:
    """The same numbers in float64."""
    return r.replace(q=r.q.double()).working()


def delta_arguments(per_channel: bool) -> dict[str, torch.Tensor]:
    decay = -F.softplus(normal(B, T, H, K, seed=4) if per_channel else normal(B, T, H, seed=4))
    return {
        "query": normal(B, T, HG if not per_channel else H, K, seed=1),
        "key": normal(B, T, HG if not per_channel else H, K, seed=2),
        "value": normal(B, T, H, V, seed=3),
        "g": decay,
        "beta": torch.sigmoid(normal(B, T, H, seed=5)),
        "initial_state": normal(B, H, K, V, seed=6),
    }


def delta_recurrence(query, key, value, g, beta, initial_state) -> Recurrence:
    q, k = (F.normalize(x, dim=-1, eps=1e-3).repeat_interleave(H // x.shape[2], dim=2) for x in (query, key))
    alpha = g.exp() if g.ndim == 4 else g.exp()[..., None]
    return Recurrence(
        q, k, beta[..., None] * value, g, b=alpha * k, beta=beta, scale=K**-0.5, initial_state=initial_state
    )


@pytest.mark.parametrize(
    "op", [qwen.torch_chunk_gated_delta_rule, qwen.torch_recurrent_gated_delta_rule], ids=["chunk", "recurrent"]
)
def test_gated_delta_rule(op: Callable) -> None:
    arguments = delta_arguments(per_channel=False)
    op = inspect.unwrap(op)
    outputs, state = op(**arguments, output_final_state=True, use_qk_l2norm_in_kernel=True)
    found = delta_recurrence(**arguments).scan()
    torch.testing.assert_close(found.outputs, outputs, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(found.final_state, state, rtol=1e-5, atol=2e-6)


@pytest.mark.skipif(kimi is None, reason="this transformers has no Kimi Linear")
@pytest.mark.parametrize("form", ["chunk", "recurrent"])
def test_kimi_delta_attention(form: str) -> None:
    arguments = delta_arguments(per_channel=True)
    op = inspect.unwrap(getattr(kimi, f"{form}_kimi_delta_attention"))
    outputs, state = op(**arguments, output_final_state=True, use_qk_l2norm_in_kernel=True)
    found = delta_recurrence(**arguments).scan()
    torch.testing.assert_close(found.outputs, outputs, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(found.final_state, state, rtol=1e-5, atol=2e-6)


def test_mamba2() -> None:
    x, dt = normal(B, T, H, V, seed=1), F.softplus(normal(B, T, H, seed=2))
    decay_rate = -torch.exp(normal(H, seed=3))
    key, query = normal(B, T, HK, K, seed=4), normal(B, T, HK, K, seed=5)  # groups of heads share them
    initial = normal(B, H, V, K, seed=6)  # upstream's state is value-first
    outputs, state = inspect.unwrap(mamba2.mamba2_chunk_scan)(
        x, dt, decay_rate, key, query, chunk_size=32, initial_states=initial, return_final_states=True
    )
    k, q = (z.repeat_interleave(H // HK, dim=2) for z in (key, query))
    found = Recurrence(q, k, dt[..., None] * x, dt * decay_rate, initial_state=initial.mT).scan()
    torch.testing.assert_close(found.outputs, outputs, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(found.final_state, state.mT, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("strongest_decay", [1e-3, 1.0, 100.0, 1000.0])
@pytest.mark.parametrize("form", FORMS)
def test_float32_is_near_the_float64_reference(form: str, strongest_decay: float) -> None:
    r = random_recurrence(form, T=300, K=32, V=16, most_beta=2.0, strongest_decay=strongest_decay, initial_state=True)
    exact = lifted(r)
    found, truth = r.scan(), exact.scan(method="reference")
    assert found.outputs.dtype == torch.float32
    assert off(found.outputs, truth.outputs) < 1e-6
    assert off(found.final_state, truth.final_state) < 1e-6
    assert off(r.states(1, slice(None, None, 7)), exact.states(1, slice(None, None, 7), method="reference")) < 1e-6


@pytest.mark.parametrize("declare_beta", [True, False])
@pytest.mark.parametrize("form", ["deltanet", "gdn", "kda"])
@pytest.mark.parametrize("spread", [1e-3, 1e-1])
def test_nearly_equal_keys_with_beta_near_two(form: str, declare_beta: bool, spread: float) -> None:
    """The erase is then nearly a reflection, again and again the same: the hardest solve there is."""
    r = random_recurrence(form, T=512, K=64, V=32, strongest_decay=1e-3)
    k = F.normalize(F.normalize(normal(1, 1, 2, 64), dim=-1) + spread / 8 * normal(1, 512, 2, 64, seed=1), dim=-1)
    beta = torch.full((1, 512, 2), 1.99)
    b = k if r.log_decay is None else k * (r.log_decay if form == "kda" else r.log_decay[..., None]).exp()
    r = r.replace(k=k, beta=beta, b=b)
    exact = lifted(r).outputs(method="reference")
    found = r if declare_beta else r.replace(a=r.a)
    assert (found.beta is not None) == declare_beta
    assert off(found.outputs(), exact) < 1e-5


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
    found, truth = r.scan(), r.scan(method="reference")
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)
    slopes = [torch.autograd.grad(scan.outputs.square().sum(), list(leaves.values())) for scan in (found, truth)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-9, atol=1e-9)
    x = normal(2, 8).double()
    torch.testing.assert_close(r.propagate(x, 3, 0), r.propagate(x, 3, 0, method="reference"))
