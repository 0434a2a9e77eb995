"""fla's ops whose kernels make their own gates, against fla's naive references: float64 to 1e-10, float32 to 1e-5. All
rules against the kernels themselves: ``test_fla_kernels.py``."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

import pytest
import torch
from fla_models import import_fla
from tiny_models import KeepFloat64
from torch.testing import assert_close

from hookpoints import Recurrence
from hookpoints.rules.base import l2_normalise
from hookpoints.rules.hgrn import HGRN
from hookpoints.rules.tables import (
    FLA_GATED_DELTA,
    FLA_GATED_DELTA_2,
    FLA_GLA,
    FLA_KIMI_DELTA,
    FLA_SIMPLE_GLA,
)

B, T, H, HV, K, V = 2, 37, 2, 4, 8, 5
DTYPES = [torch.float64, torch.float32]
IN_KERNEL = dict.fromkeys(("use_gate_in_kernel", "use_qk_l2norm_in_kernel", "use_beta_sigmoid_in_kernel"), True)


def normal(seed: int, *shape: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def call(dtype, heads: int = HV, key_heads: int | None = None, **arguments):
    """Arguments of an op call with a state to begin with, in fla's value-first layout."""
    shared = {
        "q": normal(0, B, T, key_heads or heads, K, dtype=dtype),
        "k": normal(1, B, T, key_heads or heads, K, dtype=dtype),
        "v": normal(2, B, T, heads, V, dtype=dtype),
        "initial_state": normal(3, B, heads, V, K, dtype=dtype),
        "state_v_first": True,
        "output_final_state": True,
        "scale": None,
    }
    return {**shared, **arguments}


def exact(dtype):
    """Casts to float32 do nothing where the arguments are float64."""
    return KeepFloat64() if dtype == torch.float64 else nullcontext()


def check(rule, arguments, outputs, state, dtype, rounded=False):
    """The rule's recurrence against reference outputs [B,T,H,V], which may be rounded to float32, and a key-first final
    state."""
    recurrence = Recurrence.of(rule.form(rule.factors(arguments), arguments))
    for method in ("chunked", "reference"):
        found = recurrence.scan(method=method)
        for ours, theirs in ((found.outputs, outputs), (found.final_state, state)):
            if dtype == torch.float64:
                assert_close(ours, theirs.double(), rtol=0, atol=1e-6 if rounded and theirs is outputs else 1e-10)
            else:
                error = (ours - theirs).pow(2).mean().sqrt() / theirs.pow(2).mean().sqrt()
                assert error < 1e-5
    assert found.outputs.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_kernel", [True, False])
def test_gated_delta(in_kernel, dtype):
    """Grouped heads; gates, norms and the sigmoid of beta inside the kernel, or made before."""
    import_fla()
    from fla.ops.gated_delta_rule.gate import naive_gdn_gate
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule

    raw = normal(4, B, T, HV, dtype=dtype)
    a_log, bias = (normal(seed, HV, dtype=dtype) for seed in (5, 6))
    strength = normal(7, B, T, HV, dtype=dtype)
    given = call(dtype, HV, H, g=raw, beta=strength, A_log=a_log, dt_bias=bias, allow_neg_eigval=True, **IN_KERNEL)
    with exact(dtype):
        g = naive_gdn_gate(raw, a_log, bias, output_dtype=dtype)
        beta = 2 * strength.sigmoid()
        q, k = (l2_normalise(given[name]) for name in "qk")
        if not in_kernel:
            given |= {"q": q, "k": k, "g": g, "beta": beta}
            given |= {name: False for name in given if name.startswith("use_")} | {"allow_neg_eigval": False}
        q, k = (x.repeat_interleave(HV // H, 2) for x in (q, k))
        out = naive_recurrent_gated_delta_rule(
            q, k, given["v"], beta, g, initial_state=given["initial_state"].mT, output_final_state=True
        )
    check(FLA_GATED_DELTA, given, *out, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bound", [None, -5.0])
def test_kda(bound, dtype):
    import_fla()
    from fla.ops.kda.gate import naive_kda_gate, naive_kda_lowerbound_gate
    from fla.ops.kda.naive import naive_recurrent_kda

    raw = normal(4, B, T, HV, K, dtype=dtype)
    a_log, bias = (normal(seed, size, dtype=dtype) for seed, size in ((5, HV), (6, HV * K)))
    given = call(dtype, HV, H, g=raw, beta=normal(7, B, T, HV, dtype=dtype), A_log=a_log, dt_bias=bias, **IN_KERNEL)
    given |= {"lower_bound": bound, "safe_gate": bound is not None, "allow_neg_eigval": False}
    with exact(dtype):
        gate = naive_kda_gate if bound is None else naive_kda_lowerbound_gate
        g = gate(raw, a_log, bias, **({} if bound is None else {"lower_bound": bound}), output_dtype=dtype)
        q, k = (l2_normalise(given[name]) for name in "qk")
        out = naive_recurrent_kda(
            q, k, given["v"], g, given["beta"].sigmoid(), None, given["initial_state"].mT.contiguous(), True
        )
    check(FLA_KIMI_DELTA, given, *out, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_delta_2(dtype):
    """Key-first, and with all heads expanded by the layer."""
    import_fla()
    from fla.ops.gdn2 import naive_recurrent_gdn2

    given = call(dtype, g=-normal(4, B, T, HV, K, dtype=dtype).exp(), use_qk_l2norm_in_kernel=True)
    given |= {
        "b": 2 * normal(5, B, T, HV, K, dtype=dtype).sigmoid(),
        "w": normal(6, B, T, HV, V, dtype=dtype).sigmoid(),
    }
    with exact(dtype):
        q, k = (l2_normalise(given[name]) for name in "qk")
        out = naive_recurrent_gdn2(
            q, k, *(given[name] for name in "vgbw"), None, given["initial_state"].mT, output_final_state=True
        )
    check(FLA_GATED_DELTA_2, given, *out, dtype, rounded=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hgrn(dtype):
    """A vector as a matrix of one row; and what is fed and returned is in the form that the ops have."""
    import_fla()
    from fla.ops.hgrn.naive import naive_recurrent_hgrn

    given = {"x": normal(0, B, T, V, dtype=dtype), "g": -normal(1, B, T, V, dtype=dtype).exp()}
    # The reference begins in float32 whatever it is given.
    given |= {"initial_state": normal(2, B, V, dtype=torch.float32).to(dtype), "output_final_state": True}
    with exact(dtype):
        native = naive_recurrent_hgrn(**given)
    result = HGRN.read_result(native, given)
    check(HGRN, given, result.outputs, result.final_state, dtype)
    assert_close(HGRN.write_result(result, given), native)
    changed = HGRN.factors(given).over_time(lambda x: x / 2)
    fed = HGRN.factors(HGRN.arguments(given, changed, {"v", "log_decay"}))
    assert_close((fed.v, fed.log_decay), (changed.v, changed.log_decay))


@pytest.mark.parametrize(
    "rule, own",
    [
        (FLA_GATED_DELTA, {"A_log": normal(5, HV), "dt_bias": None, "use_gate_in_kernel": True}),
        (FLA_KIMI_DELTA, {"A_log": normal(5, HV), "dt_bias": None, "lower_bound": -3.0, "use_gate_in_kernel": True}),
        (FLA_GLA, {}),
        (FLA_SIMPLE_GLA, {"g_gamma": None}),
    ],
    ids=["gated_delta", "kda", "gla", "simple_gla"],
)
def test_what_is_fed_is_what_the_op_uses(rule, own):
    """Changed factors handed to an op, and read off that call again, are the same: what the kernel would have done
    with them is turned off."""
    per_channel = rule in (FLA_KIMI_DELTA, FLA_GLA)
    gate = -normal(4, B, T, HV, K).abs() if per_channel else -normal(4, B, T, HV).abs()
    heads = H if "A_log" in own else HV
    given = call(torch.float64, HV, heads, g=gate, **own)
    if "beta" in rule.factor_names:
        given |= {"beta": normal(7, B, T, HV), "use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True}
        given["use_qk_l2norm_in_kernel"] = True
    factors = rule.factors(given)
    changes = {name: getattr(factors, name) * 1.5 for name in rule.factor_names}
    for names in (rule.factor_names, *((name,) for name in rule.factor_names)):
        edited = dataclasses.replace(factors, **{name: changes[name] for name in names})
        again = rule.factors(rule.arguments(given, edited, frozenset(names)))
        for name in rule.factor_names:
            assert_close(getattr(again, name), getattr(edited, name), rtol=0, atol=1e-12)
