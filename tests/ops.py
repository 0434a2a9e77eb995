"""A rule compared with its op: what the op computes, and each factor fed to it by itself."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from recurrences import drawn
from tiny_models import KeepFloat64
from torch import Tensor
from torch.testing import assert_close

from hookpoints import Recurrence
from hookpoints.rules import Rule

B, T, H, K, V = 2, 45, 4, 8, 6
EXACT = {"rtol": 0, "atol": 1e-10}


class Case(NamedTuple):
    """A rule, its op written token by token, and a call."""

    rule: Rule
    op: Callable[..., Any]
    make: Callable[[], dict[str, Any]]
    """Arguments of the call, drawn anew; those that the op does not take are left out."""
    read_of: Callable = lambda result: result
    """What the layer takes of the op's result."""
    sizes: tuple[int, int, int] = (H, K, V)
    """H, K and V of the recurrence."""


def bound(op: Callable[..., Any], available: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call by name, with defaults, without what the op does not take."""
    parameters = inspect.signature(op).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return defaults | {name: x for name, x in available.items() if takes_any or name in parameters}


def clone(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in arguments.items()}


def token_by_token(
    state: Tensor, length: int, step: Callable[[int, Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Reads [B,T,...] and the last state; ``step`` makes the state after a token and what is read there."""
    reads = []
    for t in range(length):
        state, read = step(t, state)
        reads.append(read)
    return torch.stack(reads, dim=1), state


def unit(x: Tensor) -> Tensor:
    """x over its norm, upstream's epsilon inside of the root."""
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def assert_canonical_form_is_the_op(case: Case) -> None:
    """Reads, states and what the layer gets back, in float64."""
    rule = case.rule
    arguments = bound(case.op, case.make())
    with KeepFloat64():
        own = clone(arguments)
        fed = clone(arguments)
        expected = case.op(**own)
        factors = rule.factors(arguments)
        r = Recurrence.of(rule.form(factors, arguments))
        native = rule.read_result(case.op(**clone(rule.arguments(arguments, factors, frozenset()))), arguments)
        for method in ("chunked", "reference"):
            ours = r.scan(method=method)
            assert_close(native.outputs, ours.outputs, **EXACT)
        back = rule.write_result(native._replace(outputs=ours.outputs, final_state=ours.final_state), fed)
    assert_close(case.read_of(back), case.read_of(expected), **EXACT)
    if "state" in arguments:  # the update overwrites the cache's state
        assert_close(fed["state"], own["state"], **EXACT)
    assert (1 if "state" in arguments else T, *case.sizes) == (r.T, r.H, r.K, r.V)
    assert rule.wants_state(arguments) and ours.final_state.shape == (B, *case.sizes)


def assert_each_factor_can_be_fed(case: Case) -> None:
    """A changed factor reaches the op, and nothing else changes: not the decay with beta, nor the skip with v."""
    rule = case.rule
    arguments = bound(case.op, case.make())
    with KeepFloat64():
        factors = rule.factors(arguments)
        for field in rule.factor_names:
            old = getattr(factors, field)
            if old is None or field in rule.not_fed | (rule.torch_only if rule.kernel_only else frozenset()):
                continue
            # Keys longer than 1 would make the delta rules explode.
            new = 0.7 * old if field in ("k", "log_decay") else old + drawn(0, *old.shape).abs()
            changed = dataclasses.replace(factors, **{field: new})
            ours = Recurrence.of(rule.form(changed, arguments)).scan(method="reference")
            fed = clone(rule.arguments(arguments, changed, frozenset({field})))
            native = rule.read_result(case.op(**fed), fed)
            assert_close(native.outputs, ours.outputs, **EXACT, msg=lambda message, field=field: f"{field}: {message}")
            assert_close(native.final_state, ours.final_state, **EXACT)
