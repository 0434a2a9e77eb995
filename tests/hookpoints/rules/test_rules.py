"""Each update rule against its op, in float64: transformers' own torch ops, and those of fla that take several steps a
token or read before they write, written token by token. fla's kernels: oracles."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace

import pytest
import torch
from ops import (
    EXACT,
    B,
    Case,
    H,
    K,
    T,
    V,
    assert_canonical_form_is_the_op,
    assert_each_factor_can_be_fed,
    bound,
    token_by_token,
    unit,
)
from recurrences import drawn as normal
from tiny_models import modelling
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from hookpoints import Recurrence
from hookpoints.rules.delta_product import GATED_DELTA_PRODUCT
from hookpoints.rules.mamba1 import MAMBA1
from hookpoints.rules.mamba2 import MAMBA2
from hookpoints.rules.rwkv7 import FLA_RWKV7, RWKV7
from hookpoints.rules.tables import FLA_DELTA, FLA_GATED_DELTA, FLA_KIMI_DELTA, FLA_RWKV6, GATED_DELTA, KIMI_DELTA
from hookpoints.rwkv7 import rwkv7_recurrence

R = 3


def delta_call(grouped: int, *per_channel: int) -> dict:
    return {
        "query": normal(1, B, T, grouped, K),
        "key": normal(2, B, T, grouped, K),
        "value": normal(3, B, T, H, V),
        "g": -F.softplus(normal(4, B, T, H, *per_channel)),
        "beta": torch.sigmoid(normal(5, B, T, H)),
        "initial_state": normal(6, B, H, K, V),
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
    }


def scan_call(grouped: int) -> dict:
    """All that a layer may hand over: groups, bias, softplus, clamp, skip, a state to begin with (value-first)."""
    return {
        "hidden_states": normal(1, B, T, H, V),
        "dt": normal(2, B, T, H),
        "A": -normal(3, H).exp(),
        "B": normal(4, B, T, grouped, K),
        "C": normal(5, B, T, grouped, K),
        "chunk_size": 16,
        "D": normal(6, H),
        "dt_bias": normal(7, H),
        "dt_softplus": True,
        "dt_limit": (0.3, 0.9),
        "initial_states": normal(8, B, H, V, K),
        "return_final_states": True,
    }


def update_call(grouped: int) -> dict:
    """One token; upstream expands the step size, A and D over the head."""
    return {
        "state": normal(8, B, H, V, K),
        "hidden_states": normal(1, B, H, V),
        "dt": normal(2, B, H, 1).expand(-1, -1, V),
        "A": (-normal(3, H).exp())[:, None, None].expand(-1, V, K),
        "B": normal(4, B, grouped, K),
        "C": normal(5, B, grouped, K),
        "D": normal(6, H)[:, None].expand(-1, V),
        "dt_bias": normal(7, H)[:, None].expand(-1, V),
        "dt_softplus": True,
        "z": normal(9, B, H, V),
    }


def mamba1_call(update: bool) -> dict:
    """Without heads, the time axis last; the arguments of both ops, of which each takes its own."""
    time = () if update else (T,)
    call = {name: normal(i, B, V, *time) for i, name in enumerate(("hidden_states", "dt", "z"))}
    call |= {"B": normal(4, B, K, *time), "C": normal(5, B, K, *time), "A": -normal(3, V, K).exp(), "D": normal(6, V)}
    call |= {"delta_bias": normal(7, V), "delta_softplus": True, "dt_bias": normal(7, V), "dt_softplus": True}
    return call | ({"state": normal(8, B, V, K)} if update else {"return_last_state": True})


# -- ops of fla, token by token


def gated_delta_rule(
    q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel
) -> tuple[Tensor, Tensor]:
    """As in the paper of Gated DeltaNet, eq. 10."""
    q, k = (unit(q), unit(k)) if use_qk_l2norm_in_kernel else (q, k)

    def step(t: int, S: Tensor) -> tuple[Tensor, Tensor]:
        # One decay for each head, or for each key channel.
        S = S if g is None else g[:, t].exp().reshape(*S.shape[:2], -1, 1) * S
        read_back = torch.einsum("bhkv,bhk->bhv", S, k[:, t])
        S = S + torch.einsum("bh,bhk,bhv->bhkv", beta[:, t], k[:, t], v[:, t] - read_back)
        return S, torch.einsum("bhkv,bhk->bhv", S, q[:, t]) * (scale or k.shape[-1] ** -0.5)

    return token_by_token(initial_state, k.shape[1], step)


def delta_rule_with_gates(
    q,
    k,
    g,
    beta,
    initial_state,
    use_gate_in_kernel,
    use_beta_sigmoid_in_kernel,
    allow_neg_eigval,
    A_log,
    dt_bias,
    lower_bound,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """What fla's kernels make of their arguments before the delta rule; their states are value-first."""
    if use_gate_in_kernel:
        g = g + dt_bias.view(g.shape[2:])
        rate = A_log.exp().view(-1, *[1] * (g.ndim - 3))
        g = -rate * F.softplus(g) if lower_bound is None else lower_bound * (rate * g).sigmoid()
    beta = beta.sigmoid() if use_beta_sigmoid_in_kernel else beta
    beta = 2 * beta if allow_neg_eigval else beta
    q, k = (x.repeat_interleave(H // x.shape[2], 2) for x in (q, k))
    for name in ("state_v_first", "safe_gate", "num_householder"):
        del kwargs[name]
    outputs, state = gated_delta_rule(q=q, k=k, g=g, beta=beta, initial_state=initial_state.mT, **kwargs)
    return outputs, state.mT


def gated_delta_product(num_householder, q, g, **kwargs) -> tuple[Tensor, Tensor]:
    """Steps as tokens: the decay in the first of each token, the read after the last."""
    n = num_householder
    first = None if g is None else torch.stack([g] + [0 * g] * (n - 1), 2).flatten(1, 2)
    outputs, state = gated_delta_rule(q=q.repeat_interleave(n, 1), g=first, **kwargs)
    return outputs[:, n - 1 :: n], state


def rwkv6(r, k, v, w, u, scale, initial_state, output_final_state) -> tuple[Tensor, Tensor]:
    """Finch, eq. 19: the state before the token, and the bonus for the token itself."""

    def step(t: int, S: Tensor) -> tuple[Tensor, Tensor]:
        own = torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        read = scale * torch.einsum("bhkv,bhk->bhv", S + u[..., None] * own, r[:, t])
        return w[:, t].exp()[..., None] * S + own, read

    return token_by_token(initial_state, T, step)


def rwkv7(r, w, k, v, a, b, initial_state, **_) -> tuple[Tensor, Tensor]:
    """The paper's equation, one token and one K x K matrix after the other."""

    def step(t: int, S: Tensor) -> tuple[Tensor, Tensor]:
        moved = (torch.diag_embed(w[:, t].exp()) + b[:, t, ..., None] * a[:, t, ..., None, :]) @ S
        S = moved + k[:, t, ..., None] * v[:, t, ..., None, :]
        return S, (S * r[:, t, ..., None]).sum(-2)

    return token_by_token(initial_state, r.shape[1], step)


def fused_rwkv7(kk, a, **kwargs) -> tuple[Tensor, Tensor]:
    """fla's decoding op, with the erase key and the rate apart."""
    return rwkv7(a=-kk, b=kk * a, **kwargs)


def product_call(steps: int = R, **changes) -> dict:
    return {
        "num_householder": steps,
        "q": normal(1, B, T, H, K),
        "k": normal(2, B, T * steps, H, K),
        "v": normal(3, B, T * steps, H, V),
        "g": -F.softplus(normal(4, B, T, H)),
        "beta": 2 * torch.sigmoid(normal(5, B, T * steps, H)),
        "scale": None,
        "initial_state": normal(6, B, H, K, V),
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
        **changes,
    }


def gates_call(*per_channel: int, **flags) -> dict:
    """Two key heads for four of values, and everything that a kernel may be asked to make."""
    return {
        **product_call(1, beta=normal(5, B, T, H)),
        **{name: normal(i, B, T, 2, K) for i, name in enumerate("qk")},
        "g": normal(4, B, T, H, *per_channel),
        "initial_state": normal(6, B, H, V, K),
        "state_v_first": True,
        "A_log": normal(7, H),
        "dt_bias": normal(8, math.prod((H, *per_channel))),
        "lower_bound": None,
        "safe_gate": False,
        "allow_neg_eigval": True,
        **dict.fromkeys(("use_gate_in_kernel", "use_beta_sigmoid_in_kernel"), True),
        **flags,
    }


def stepwise_call() -> dict:
    """As the layer makes it for short sequences: zeros where a step has no decay, or is not read."""
    call = product_call()
    del call["num_householder"]
    q, g = call["q"].new_zeros(B, T, R, H, K), call["g"].new_zeros(B, T, R, H)
    q[:, :, -1], g[:, :, 0] = call["q"], call["g"]
    return {**call, "q": q.flatten(1, 2), "g": g.flatten(1, 2)}


def rwkv6_call() -> dict:
    return {
        "r": normal(1, B, T, H, K),
        "k": normal(2, B, T, H, K),
        "v": normal(3, B, T, H, V),
        "w": -normal(4, B, T, H, K).exp(),
        "u": normal(5, H, K),
        "scale": 1.0,
        "initial_state": normal(6, B, H, K, V),
        "output_final_state": True,
    }


def rwkv7_call(length: int = T) -> dict:
    """The erase key is normalized, and is not the key that is written."""
    erase = F.normalize(normal(1, B, length, H, K), dim=-1)
    return {
        "r": normal(3, B, length, H, K),
        "w": -0.6 * normal(4, B, length, H, K).sigmoid(),
        "k": normal(5, B, length, H, K),
        "v": normal(6, B, length, H, V),
        "a": -erase,
        "b": erase * normal(2, B, length, H, K).sigmoid(),
        "scale": 1.0,
        "initial_state": normal(7, B, H, K, V),
        "output_final_state": True,
    }


def fused_rwkv7_call() -> dict:
    call = rwkv7_call()
    erase, along = -call["a"], call.pop("b")
    return call | {"kk": erase, "a": along / erase}


def of_transformers() -> dict[str, Case]:
    # The oldest versions expand groups of heads before they call the op, not inside it.
    inside = inspect.unwrap(modelling("qwen3_5").torch_chunk_gated_delta_rule).__code__.co_names
    groups = 2 if "repeat_interleave" in inside else H
    mamba2 = ("mamba2", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2")
    cases = {}
    for rule, families, *calls in (
        (GATED_DELTA, ("qwen3_5", "lara_mini"), *[lambda: delta_call(groups)] * 2),
        (KIMI_DELTA, ("kimi_linear", "bailing_hybrid"), *[lambda: delta_call(H, K)] * 2),
        (MAMBA2, mamba2, lambda: scan_call(groups), lambda: update_call(groups)),
        (MAMBA1, ("falcon_mamba", "jamba", "mamba"), lambda: mamba1_call(False), lambda: mamba1_call(True)),
    ):
        sizes = (1 if rule is MAMBA1 else H, K, V)
        for family in families:
            for op, make in zip(rule.ops, calls):
                if (module := modelling(family)) is not None:
                    cases[f"{family}-{op}"] = Case(rule, inspect.unwrap(getattr(module, op)), make, sizes=sizes)
    return cases


PRODUCT = replace(GATED_DELTA_PRODUCT, rank=R)
CASES = of_transformers() | {
    "gated delta of fla": Case(FLA_GATED_DELTA, delta_rule_with_gates, gates_call),
    "kda of fla": Case(FLA_KIMI_DELTA, delta_rule_with_gates, lambda: gates_call(K, allow_neg_eigval=False)),
    "kda of fla, bounded": Case(
        FLA_KIMI_DELTA, delta_rule_with_gates, lambda: gates_call(K, lower_bound=-3.0, safe_gate=True)
    ),
    "product": Case(PRODUCT, gated_delta_product, product_call),
    "product of one": Case(replace(GATED_DELTA_PRODUCT, rank=1), gated_delta_product, lambda: product_call(1)),
    "product without decay": Case(PRODUCT, gated_delta_product, lambda: product_call(g=None)),
    "stepwise": Case(PRODUCT, gated_delta_rule, stepwise_call, lambda result: (result[0][:, R - 1 :: R], result[1])),
    "rwkv6": Case(FLA_RWKV6, rwkv6, rwkv6_call),
    "rwkv7": Case(RWKV7, rwkv7, rwkv7_call),
    "rwkv7 of fla": Case(FLA_RWKV7, rwkv7, rwkv7_call),
    "fused rwkv7": Case(FLA_RWKV7, fused_rwkv7, fused_rwkv7_call),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_rule_is_its_op(case: Case):
    assert_canonical_form_is_the_op(case)
    assert_each_factor_can_be_fed(case)


def test_strengths_reach_2_where_negative_eigenvalues_are_allowed():
    x = torch.ones(B, T, H)
    assert_close(FLA_DELTA.read("beta", {"v": x, "beta": x, "allow_neg_eigval": True}, x.dtype), 2 * x)


@pytest.mark.parametrize("length", [1, 3, 45, 64])
def test_the_operation_of_rwkv7_is_the_papers_equation(length: int):
    assert_close(rwkv7_recurrence(**rwkv7_call(length)), rwkv7(**rwkv7_call(length)), **EXACT)


def test_other_calls_of_the_scan():
    """Without state, bias, softplus or skip, in the dtypes of a bfloat16 model."""
    rule, op, make, *_ = CASES["mamba2-mamba2_chunk_scan"]
    arguments = bound(op, make()) | {"D": None, "dt_bias": None, "dt_softplus": False, "initial_states": None}
    arguments |= {"return_final_states": False, "dt": arguments["dt"].abs()}
    half = {n: x.bfloat16() if isinstance(x, Tensor) else x for n, x in arguments.items()}
    half["A"] = arguments["A"].float()
    r = Recurrence.of(rule.form(rule.factors(half), half))
    assert r.dtype == rule.output_dtype(half) == op(**half).dtype == torch.float32
    assert_close(r.outputs(), op(**half), rtol=1e-4, atol=1e-4)
    assert not rule.wants_state(half) and rule.read_result(r.outputs(), half).final_state is None


@pytest.mark.parametrize(("name", "runs"), [("chunk_delta_rule", False), ("fused_recurrent_delta_rule", True)])
def test_the_chunk_op_of_deltanet_takes_no_float32(name, runs):
    """On a GPU, that is; hookpoints' own kernel steps in."""

    def op():
        raise AssertionError

    op.__name__ = name
    assert FLA_DELTA.runs(op, {"v": torch.empty(1, device="meta")}) is runs
    assert FLA_DELTA.runs(op, {"v": torch.empty(1, device="meta", dtype=torch.bfloat16)})
    assert not FLA_DELTA.runs(op, {"v": torch.empty(1)})
