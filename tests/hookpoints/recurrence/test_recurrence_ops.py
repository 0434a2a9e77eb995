"""Rules of fla's ops that take several steps a token, read before they write, or read back with a key of their own,
against the same ops written token by token. fla itself is not needed; its kernels are met in tests/oracles."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from hookpoints import Recurrence
from hookpoints.rules import OpFactors, Rule
from hookpoints.rules.delta_product import GATED_DELTA_PRODUCT
from hookpoints.rules.tables import FLA_COMBA, FLA_RWKV6

B, T, G, H, K, V, R = 2, 19, 2, 4, 6, 5, 3
EXACT = {"rtol": 0, "atol": 1e-10}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def gated_delta_rule(
    q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel
) -> tuple[Tensor, Tensor]:
    """Token by token, as in the paper of Gated DeltaNet, eq. 10."""
    q, k = (unit(q), unit(k)) if use_qk_l2norm_in_kernel else (q, k)
    S, outputs = initial_state, []
    for t in range(k.shape[1]):
        S = S if g is None else g[:, t].exp()[..., None, None] * S
        S = S + torch.einsum(
            "bh,bhk,bhv->bhkv", beta[:, t], k[:, t], v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t])
        )
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]) * (scale or k.shape[-1] ** -0.5))
    return torch.stack(outputs, 1), S


def gated_delta_product(num_householder, q, g, **rest) -> tuple[Tensor, Tensor]:
    """Steps as tokens: the decay in the first of each token, the read after the last."""
    n = num_householder
    first = None if g is None else torch.stack([g] + [0 * g] * (n - 1), 2).flatten(1, 2)
    outputs, state = gated_delta_rule(q=q.repeat_interleave(n, 1), g=first, **rest)
    return outputs[:, n - 1 :: n], state


def rwkv6(r, k, v, w, u, scale, initial_state, output_final_state) -> tuple[Tensor, Tensor]:
    """Finch, eq. 19: the state before the token, and the bonus for the token itself."""
    S, outputs = initial_state, []
    for t in range(T):
        own = torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", S + u[..., None] * own, r[:, t]))
        S = w[:, t].exp()[..., None] * S + own
    return torch.stack(outputs, 1), S


def comba(q, k, p, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel):
    """As fla's kernels do it: what p reads back is taken off before the decay acts on the state."""
    q, k, p = (unit(x) if use_qk_l2norm_in_kernel else x for x in (q, k, p))
    q, k, p = (x.repeat_interleave(H // x.shape[2], 2) for x in (q, k, p))
    S, outputs = initial_state, []
    for t in range(T):
        value = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", S, p[:, t]))
        S = g[:, t].exp()[..., None, None] * S + torch.einsum("bhk,bhv->bhkv", k[:, t], value)
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]) * K**-0.5)
    return torch.stack(outputs, 1), S


def delta_arguments(steps: int) -> dict:
    return {
        "k": normal(2, B, T * steps, H, K),
        "v": normal(3, B, T * steps, H, V),
        "beta": 2 * torch.sigmoid(normal(5, B, T * steps, H)),
        "scale": None,
        "initial_state": normal(6, B, H, K, V),
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
    }


def product_call(steps: int = R) -> dict:
    own = {"q": normal(1, B, T, H, K), "g": -F.softplus(normal(4, B, T, H)), "num_householder": steps}
    return {**own, **delta_arguments(steps)}


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


def comba_call() -> dict:
    grouped = {name: normal(i, B, T, G, K) for i, name in enumerate("qkp")}
    gates = {"g": -F.softplus(normal(4, B, T, H)), "beta": torch.sigmoid(normal(5, B, T, H))}
    return {**delta_arguments(1), **grouped, **gates}


class Case(NamedTuple):
    rule: Rule
    op: Callable
    make: Callable[[], dict]
    read_of: Callable[[Tensor], Tensor] = lambda outputs: outputs
    """What the layer takes of the op's outputs."""


def last_step(outputs: Tensor) -> Tensor:
    return outputs[:, R - 1 :: R]


CASES = {
    "product": Case(replace(GATED_DELTA_PRODUCT, rank=R), gated_delta_product, product_call),
    "product of one": Case(replace(GATED_DELTA_PRODUCT, rank=1), gated_delta_product, lambda: product_call(1)),
    "stepwise": Case(replace(GATED_DELTA_PRODUCT, rank=R), gated_delta_rule, stepwise_call, last_step),
    "rwkv6": Case(FLA_RWKV6, rwkv6, rwkv6_call),
    "comba": Case(FLA_COMBA, comba, comba_call),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@every_case
def test_the_canonical_form_is_the_op(case: Case) -> None:
    """Reads, state, and what the layer gets back."""
    rule, call = case.rule, case.make()
    expected, state = case.op(**call)
    factors = rule.factors(call)
    r = Recurrence.of(rule.form(factors, call))
    native = rule.read_result(case.op(**rule.arguments(call, factors, frozenset())), call)
    assert (r.B, r.T, r.H, r.K, r.V) == (B, T, H, K, V)
    for method in ("reference", "chunked"):
        found = r.scan(method=method)
        assert_close(native.outputs, found.outputs, **EXACT)
        assert_close(state, found.final_state, **EXACT)
        back = rule.write_result(native._replace(outputs=found.outputs), call)
        assert back[0].shape == expected.shape
        assert_close(case.read_of(back[0]), case.read_of(expected), **EXACT)


@every_case
@pytest.mark.parametrize("field", OpFactors.NAMES)
def test_each_factor_can_be_fed_by_itself(case: Case, field: str) -> None:
    rule, call = case.rule, case.make()
    factors = rule.factors(call)
    old = getattr(factors, field)
    if old is None:
        assert field not in rule.factor_names
        return
    # Keys longer than 1 would make the delta rules explode.
    new = 0.7 * old if field in ("k", "log_decay") else old + normal(0, *old.shape).abs()
    factors = dataclasses.replace(factors, **{field: new})
    fed = rule.arguments(call, factors, frozenset({field}))
    native = rule.read_result(case.op(**fed), fed)
    found = Recurrence.of(rule.form(factors, call)).scan(method="reference")
    assert_close(native.outputs, found.outputs, **EXACT)
    assert_close(native.final_state, found.final_state, **EXACT)


def test_no_decay_is_no_factor() -> None:
    """Gated DeltaProduct without its forget gate."""
    rule, call = replace(GATED_DELTA_PRODUCT, rank=R), {**product_call(), "g": None}
    factors = rule.factors(call)
    assert "log_decay" not in factors.present()
    assert_close(Recurrence.of(rule.form(factors, call)).outputs(), gated_delta_product(**call)[0], **EXACT)
