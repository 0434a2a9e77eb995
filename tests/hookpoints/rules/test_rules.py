"""Each update rule against upstream's own ops: factors, layouts, states, and how the ops are met."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types

import pytest
import torch
from conftest import KeepFloat64, make_hf, modelling
from torch.nn import functional as F
from torch.testing import assert_close

from hookpoints import HookedRecurrent, Recurrence
from hookpoints.layer.intercept import _bind, running, wrap_ops
from hookpoints.rules import OpFactors
from hookpoints.rules.mamba2 import MAMBA2
from hookpoints.rules.tables import GATED_DELTA, KIMI_DELTA

GATED = [modelling(name) for name in ("qwen3_5", "lara_mini")]
KIMI = [modelling(name) for name in ("kimi_linear", "bailing_hybrid")]
MAMBA = [modelling(name) for name in ("mamba2", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2")]
mamba2 = MAMBA[0]

B, T, H, K, V = 2, 45, 4, 8, 6
# The oldest versions expand groups of heads before they call the op, not inside it.
G = 2 if "repeat_interleave" in inspect.unwrap(GATED[0].torch_chunk_gated_delta_rule).__code__.co_names else H
EXACT = {"rtol": 0, "atol": 1e-10}


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def delta_call(per_channel: bool) -> dict:
    grouped = H if per_channel else G
    return {
        "query": normal(1, B, T, grouped, K),
        "key": normal(2, B, T, grouped, K),
        "value": normal(3, B, T, H, V),
        "g": -F.softplus(normal(4, B, T, H, K) if per_channel else normal(4, B, T, H)),
        "beta": torch.sigmoid(normal(5, B, T, H)),
        "initial_state": normal(6, B, H, K, V),
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
    }


def scan_call() -> dict:
    """All that a layer may hand over: groups, bias, softplus, clamp, skip, a state to begin with (value-first)."""
    return {
        "hidden_states": normal(1, B, T, H, V),
        "dt": normal(2, B, T, H),
        "A": -normal(3, H).exp(),
        "B": normal(4, B, T, G, K),
        "C": normal(5, B, T, G, K),
        "chunk_size": 16,
        "D": normal(6, H),
        "dt_bias": normal(7, H),
        "dt_softplus": True,
        "dt_limit": (0.3, 0.9),
        "initial_states": normal(8, B, H, V, K),
        "return_final_states": True,
    }


def update_call() -> dict:
    """One token; upstream expands the step size, A and D over the head."""
    return {
        "state": normal(8, B, H, V, K),
        "hidden_states": normal(1, B, H, V),
        "dt": normal(2, B, H, 1).expand(-1, -1, V),
        "A": (-normal(3, H).exp())[:, None, None].expand(-1, V, K),
        "B": normal(4, B, G, K),
        "C": normal(5, B, G, K),
        "D": normal(6, H)[:, None].expand(-1, V),
        "dt_bias": normal(7, H)[:, None].expand(-1, V),
        "dt_softplus": True,
        "z": normal(9, B, H, V),
    }


CALLS = [
    *((GATED_DELTA, m, name, lambda: delta_call(False)) for m in GATED if m for name in GATED_DELTA.ops),
    *((KIMI_DELTA, m, name, lambda: delta_call(True)) for m in KIMI if m for name in KIMI_DELTA.ops),
    *((MAMBA2, m, MAMBA2.ops[0], scan_call) for m in MAMBA),
    *((MAMBA2, m, MAMBA2.ops[1], update_call) for m in MAMBA),
]
every_op = pytest.mark.parametrize(
    ("rule", "module", "name", "make"), CALLS, ids=[f"{c[1].__name__.split('.')[-2]}-{c[2]}" for c in CALLS]
)


def bound(module, name: str, make) -> tuple:
    """The torch op and one call of it by name, as the seam sees it."""
    op = inspect.unwrap(getattr(module, name))
    return op, _bind(inspect.signature(op), (), make())


def clone(arguments: dict) -> dict:
    return {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


@every_op
def test_the_canonical_form_is_the_op(rule, module, name, make):
    """Reads, states and what the layer gets back, in float64."""
    op, arguments = bound(module, name, make)
    with KeepFloat64():
        own = clone(arguments)
        expected = op(**own)
        factors = rule.factors(arguments)
        r = Recurrence.of(rule.form(factors, arguments))
        native = rule.read_result(op(**clone(rule.arguments(arguments, factors, frozenset()))), arguments)
        found = r.scan(method="reference")
        assert_close(native.outputs, found.outputs, **EXACT)
        fed = clone(arguments)
        back = rule.write_result(native._replace(outputs=found.outputs, final_state=found.final_state), fed)
    assert_close(back, expected, **EXACT)
    if "state" in arguments:  # the update overwrites the cache's state
        assert_close(fed["state"], own["state"], **EXACT)
        assert not torch.equal(own["state"], arguments["state"])
    assert (1 if "state" in arguments else T) == r.T and (r.H, r.K, r.V) == (H, K, V)
    assert rule.wants_state(arguments) and found.final_state.shape == (B, H, K, V)


@every_op
@pytest.mark.parametrize("field", OpFactors.NAMES)
def test_each_factor_can_be_fed_by_itself(rule, module, name, make, field):
    """A changed factor reaches the op, and nothing else changes: not the decay with beta, nor the skip with v."""
    op, arguments = bound(module, name, make)
    with KeepFloat64():
        factors = rule.factors(arguments)
        old = getattr(factors, field)
        new = 0.7 * old if field == "log_decay" else old + normal(0, *old.shape).abs()
        factors = dataclasses.replace(factors, **{field: new})
        found = Recurrence.of(rule.form(factors, arguments)).scan(method="reference")
        fed = clone(rule.arguments(arguments, factors, frozenset({field})))
        native = rule.read_result(op(**fed), fed)
    assert_close(native.outputs, found.outputs, **EXACT)
    assert_close(native.final_state, found.final_state, **EXACT)


def test_other_calls_of_the_scan():
    """Without state, bias, softplus or skip, and in the dtypes of a bfloat16 model."""
    op, arguments = bound(mamba2, "mamba2_chunk_scan", scan_call)
    bare = {"D": None, "dt_bias": None, "dt_softplus": False, "initial_states": None, "return_final_states": False}
    arguments |= bare | {"dt": arguments["dt"].abs()}
    rule = MAMBA2
    with KeepFloat64():
        r = Recurrence.of(rule.form(rule.factors(arguments), arguments))
        assert_close(r.outputs(), op(**arguments), **EXACT)
    assert not rule.wants_state(arguments) and rule.read_result(r.outputs(), arguments).final_state is None
    half = {n: x.bfloat16() if isinstance(x, torch.Tensor) and n != "A" else x for n, x in arguments.items()}
    half["A"] = arguments["A"].float()
    r = Recurrence.of(rule.form(rule.factors(half), half))
    assert r.dtype == rule.output_dtype(half) == op(**half).dtype == torch.float32
    assert_close(r.outputs(), op(**half), rtol=1e-4, atol=1e-4)


def test_a_layer_kernel_is_declined_while_hooks_run(monkeypatch, tokens):
    """In training mamba_ssm's kernel computes conv, scan, norm and projection at once, past every hook."""
    original = inspect.unwrap(mamba2.mamba2_split_conv1d_scan_combined)

    @functools.wraps(original)
    def kernel(zxbcdt, *args, **kwargs):
        return torch.zeros_like(zxbcdt[..., :32])

    monkeypatch.setattr(mamba2, original.__name__, kernel)
    model = HookedRecurrent.from_hf(make_hf("mamba2"))
    with torch.no_grad():
        expected = model(tokens)
        model.hf_model.train()
        assert torch.equal(model(tokens), expected)
        plain = make_hf("mamba2").train()
        assert not torch.equal(plain(tokens, use_cache=False).logits, expected)  # not ours, so the kernel's business


def test_kernels_may_name_their_arguments_otherwise():
    """mamba_ssm calls ``x`` what transformers calls ``hidden_states``, and is called by position."""

    def original(hidden_states, dt, A, B, C, chunk_size, D=None, **kwargs):
        raise AssertionError("the kernel is what runs on this device")

    @functools.wraps(original)
    def kernel(x, dt, A, B, C, chunk_size, D=None):
        return x, chunk_size, D

    class Handler:
        open, module = True, torch.nn.Identity()

        def handle(self, op, arguments):
            return op(**{**arguments, "D": "changed"})

    namespace = types.ModuleType("namespace")
    namespace.mamba2_chunk_scan = kernel
    wrap_ops(namespace, MAMBA2)
    x = torch.empty(1, device="meta")

    def forward():  # looks the op up by its name, as layers do
        return namespace.mamba2_chunk_scan(x, x, x, x, x, 256, D="own", z=None)

    assert running(Handler(), forward, (), {}) == (x, 256, "changed")
