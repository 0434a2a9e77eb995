"""The interface of Recurrence: gradients, dtypes, choices, errors, and what results are written into."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recurrences import FORMS, entrywise, normal, random_recurrence
from torch.autograd import gradcheck

import hookpoints
from hookpoints.recurrence import Method, Recurrence, chunked

FIELDS = ("q", "k", "u", "log_decay", "a", "b", "beta", "initial_state")


def same(ours: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture
def r() -> Recurrence:
    return random_recurrence("gdn", B=2, T=40, H=3, K=5, V=4, dtype=torch.float64, initial_state=True)


def leaves_of(r: Recurrence) -> dict[str, torch.Tensor]:
    """The factors that are inputs of their own: beta makes a."""
    inputs = {name: getattr(r, name) for name in FIELDS if getattr(r, name) is not None}
    if r.beta is not None:
        del inputs["a"]
    return {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}


@pytest.mark.parametrize("declare_beta", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_in_every_factor(form: str, declare_beta: bool) -> None:
    """Of outputs, states and propagation."""
    r = random_recurrence(form, T=5, H=1, K=3, V=2, dtype=torch.float64, initial_state=True, declare_beta=declare_beta)
    leaves, v = leaves_of(r), normal(2, 3).requires_grad_()

    def measured(v: torch.Tensor, *factors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        changed = r.replace(**dict(zip(leaves, factors)))
        states = chunked.states(changed.select(heads=0), [0, 4], 3)
        return *chunked.scan(changed, 3), states, changed.propagate(v, 1, 0)

    assert gradcheck(measured, (v, *leaves.values()), fast_mode=True)


def test_gradients_over_several_spans_are_the_reference_ones(monkeypatch) -> None:
    monkeypatch.setattr("hookpoints.recurrence.chunked._SPAN", {"cpu": 1})  # one chunk a span
    for form in FORMS:
        r = random_recurrence(form, T=70, dtype=torch.float64, initial_state=True)
        leaves = leaves_of(r)
        slopes = []
        for method in ("chunked", "reference"):
            outputs = r.replace(**leaves).outputs(method=method)
            slopes.append(torch.autograd.grad(outputs.square().sum(), list(leaves.values())))
        torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [form for form in FORMS if random_recurrence(form).beta is not None])
def test_half_precision_factors_with_a_declared_beta_give_one_result(form: str, dtype: torch.dtype) -> None:
    """The erase that beta declares is not rounded to half, so every algorithm computes with the same erase."""
    r = random_recurrence(form, T=40)
    assert r.beta is not None
    r = r.replace(k=r.k.to(dtype), u=r.u.to(dtype), beta=r.beta.to(dtype))
    same(r.outputs(), r.outputs(method="reference"), 1e-5)
    same(r.states(), r.states(method="reference"), 1e-5)
    same(r.replace(beta=None, a=r.a).outputs(), r.outputs(), 1e-5)


def test_autocast_does_not_reach_the_state() -> None:
    r = random_recurrence("rwkv7", T=40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = r.scan()
    same(inside.outputs, r.outputs(), 0.0)
    same(inside.final_state, r.final_state(), 0.0)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_states_of_one_head_hold_little_besides_the_result() -> None:
    """Peak memory, by the resident size of a process of its own: torch's allocations are not Python's.

    The package's index is left out, which also shows that recurrences need nothing but torch.
    """
    program = f"""
import json, re, sys, types
from pathlib import Path
package = types.ModuleType("hookpoints")
package.__path__ = [{str(Path(hookpoints.__file__).parent)!r}]
sys.modules["hookpoints"] = package
import torch
from hookpoints.recurrence import Recurrence

def kilobytes(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))

torch.set_num_threads(1)
key = torch.nn.functional.normalize(torch.randn(1, 1024, 2, 128), dim=-1)
r = Recurrence(key, key, torch.randn_like(key), -0.3 * torch.rand_like(key), beta=torch.rand(1, 1024, 2), b=key)
r.states(0, [9]), r.outputs()
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = kilobytes("VmRSS")
states = r.states(0)
grown = 1024 * (kilobytes("VmHWM") - before)
print(json.dumps([grown / (4 * states.numel()), "transformers" in sys.modules]))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    peak_over_result, more_than_torch = json.loads(run.stdout)
    assert 0.9 < peak_over_result < 1.2
    assert not more_than_torch


def test_choices_of_rows_heads_and_tokens(r: Recurrence) -> None:
    outputs = r.outputs()
    same(r.select(rows=1, heads=[2, 0]).outputs(), outputs[1:, :, [2, 0]])
    same(r.select(heads=torch.tensor(1), tokens=slice(0, 9)).outputs(), outputs[:, :9, 1:2])
    same(r.select(heads=slice(1, None)).final_state(), r.final_state()[:, 1:])
    rest = r.select(heads=0, tokens=slice(9, 20), initial_state=r.states(0, 8)[:, 0])
    same(rest.outputs(), outputs[:, 9:20, :1])


def test_beta_only_saves_work(r: Recurrence) -> None:
    assert r.a is not None and r.beta is not None
    same(r.a, -r.beta[..., None] * r.k, 0.0)
    undeclared = r.replace(a=r.a)
    assert undeclared.beta is None
    same(undeclared.outputs(), r.outputs())
    same(r.replace(beta=r.beta / 2).outputs(), r.replace(a=r.a / 2).outputs())


def test_writes(r: Recurrence) -> None:
    additive = torch.einsum("bthk,bthv->bthkv", r.k, r.u)
    same(r.write(), additive)
    same(r.write(heads=[2, 0], positions=[-1, 3]), additive[:, [39, 3]][:, :, [2, 0]])


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


Q, U = ones(2, 5, 3, 4), ones(2, 5, 3, 6)
WRONG = {
    "q of other heads": (dict(q=ones(2, 5, 1, 4)), r"q .*H=3.* 1, 4"),
    "u of other length": (dict(u=ones(2, 4, 3, 6)), r"u .*T=5.*2, 4"),
    "flat key": (dict(k=ones(2, 5, 12)), "^k .*12"),
    "decay per value": (dict(log_decay=ones(2, 5, 3, 6)), "log_decay .*K=4"),
    "decay of two axes": (dict(log_decay=ones(2, 5)), r"log_decay"),
    "value-first state": (dict(initial_state=ones(2, 3, 6, 4)), "initial_state .*K=4,V=6"),
    "half an erase": (dict(a=Q), "only a"),
    "u of other rank": (dict(u=ones(2, 5, 3, 2, 6)), "^u "),
    "beta without b": (dict(beta=ones(2, 5, 3)), "only beta"),
    "rates and an erase": (dict(log_decay=U, rates=ones(3, 4, 6), a=Q, b=Q), "rates .*an erase"),
    "rates of nothing": (dict(rates=ones(3, 4, 6)), "rates .*no log_decay"),
    "value-first rates": (dict(log_decay=U, rates=ones(3, 6, 4)), "^rates .*K=4,V=6"),
}


@pytest.mark.parametrize("changes, message", WRONG.values(), ids=WRONG)
def test_wrong_factors_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recurrence(**{"q": Q, "k": Q, "u": U, **changes})


MISUSES = {
    "head": (lambda r: r.states(3), IndexError, "heads 3"),
    "position": (lambda r: r.states(0, [0, 40]), IndexError, "positions 40"),
    "method": (lambda r: r.outputs(method="fast"), ValueError, "fast"),
    "loop": (lambda r: r.propagate(normal(1, 5), 0, 0, loop="half"), ValueError, "half"),
    "carried key": (lambda r: entrywise(r).propagate(normal(1, 5), 0, 0), ValueError, "rates"),
    "start": (lambda r: r.propagate(normal(1, 5), 40, 0), IndexError, "start 40"),
    "late tokens": (lambda r: r.select(tokens=slice(4, 9)), ValueError, "initial_state"),
    "stride": (lambda r: r.select(tokens=slice(0, 9, 2)), ValueError, "step 1"),
}


@pytest.mark.parametrize("call, error, message", MISUSES.values(), ids=MISUSES)
def test_misuse_is_refused(r: Recurrence, call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(r)


@pytest.mark.parametrize("method", ["chunked", "reference"])
def test_with_a_decay_for_each_entry_value_channels_are_heads(r: Recurrence, method: Method) -> None:
    """Outputs, states, gradients, of a part as well, and the answer to other writes."""
    r = entrywise(r)
    part = r.select(heads=1, tokens=slice(0, 20))
    part_of_heads = r.by_channel().select(heads=slice(r.V, 2 * r.V), tokens=slice(0, 20))
    other = r.with_write(r.q, r.u.flip(1))
    for one, heads in ((r, r.by_channel()), (part, part_of_heads), (other, other.by_channel())):
        same(one.outputs(), heads.outputs(method=method).unflatten(2, (-1, r.V)).squeeze(-1))
        same(one.states(0, [3, 17]), heads.states(range(r.V), [3, 17], method=method)[..., 0].mT.unsqueeze(2))
        same(one.value_gradients(one.u), heads.value_gradients(heads.u, method=method).unflatten(2, (-1, r.V))[..., 0])


def test_with_a_decay_for_each_entry_value_channels_have_their_own_pattern(r: Recurrence) -> None:
    """As the equation has it; of keys that were carried as well."""
    r = entrywise(r).replace(initial_state=None)
    passed = (r.log_decay[..., None, :] * r.rates).cumsum(1)
    since = (passed[:, :, None] - passed[:, None]).exp()  # [B,T,S,H,K,V]
    weights = r.scale * torch.einsum("bthk,btshkv,bshk->bhvts", r.q, since, r.k).tril().flatten(1, 2)
    same(r.attention(), weights)
    first, later = (r.select(tokens=part, initial_state=r.starting_state()) for part in (slice(0, 17), slice(17, 40)))
    same(later.by_source(first.by_source().final_state()).outputs().transpose(1, 2), weights[:, :, 17:])


def test_rank_of_write_and_erase_are_free() -> None:
    """A write of rank 3 on a transition of rank 1 (as edits make them), and the other way round."""
    r = random_recurrence("rwkv7", B=2, T=41, H=3, K=6, V=4, dtype=torch.float64)
    k, u = normal(2, 41, 3, 3, 6), normal(2, 41, 3, 3, 4, seed=1)
    of_rank_3 = r.with_write(k, u)
    apart = [r.with_write(k[:, :, :, i], u[:, :, :, i]).outputs() for i in range(3)]
    same(of_rank_3.outputs(), torch.stack(apart).sum(0))
    same(of_rank_3.outputs(), of_rank_3.outputs(method="reference"))
    of_rank_2 = random_recurrence("gated_deltaproduct", B=2, T=41, H=3, K=6, V=4, dtype=torch.float64)
    one = of_rank_2.with_write(k[:, :, :, 0], u[:, :, :, 0])
    same(one.outputs(), one.outputs(method="reference"))
