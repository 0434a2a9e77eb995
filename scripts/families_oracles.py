"""One op call computed by someone else, token by token: what ``families_table.py`` measures hookpoints against.

An oracle takes the arguments with which a layer called its op, gates and norms not yet applied, and gives reads
[B,T,H,V] and the last state [B,H,K,V], key-first.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hookpoints.rules import Arguments, Op, OpResult, Rule
from hookpoints.rules.base import expand_groups, initial_state, l2_normalise

NAIVE = "fla's naive recurrence"


class Oracle(NamedTuple):
    """Who computes a call, and how."""

    name: str
    answer: Callable[[Arguments], OpResult]
    """The last state is None where the oracle gives none."""


def oracle_of(rule: Rule, op: Op) -> Oracle:
    """Who can compute calls of ``op``, an op of ``rule``: its torch form where it has one."""
    original = inspect.unwrap(op)
    if not original.__module__.startswith("transformers."):
        return _ORACLES[rule.ops[0]]

    def answer(a: Arguments) -> OpResult:
        # An op may add something outside the state (Mamba-2's skip); these are its arguments without.
        bare = rule.arguments(a, rule.factors(a), frozenset())
        return rule.read_result(original(**bare), bare)

    return Oracle("transformers' torch op", answer)


def _delta(a: Arguments) -> OpResult:
    from fla.ops.delta_rule.naive import delta_rule_recurrence

    q, k = _normalised(a)
    outputs, state = delta_rule_recurrence(*_heads_first(q, k, a["v"], a["beta"]), _start(a))
    return OpResult(outputs.transpose(1, 2), state)


def _gated_delta(a: Arguments) -> OpResult:
    from fla.ops.gated_delta_rule.gate import naive_gdn_gate
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule

    g, (q, k) = a["g"], _normalised(a)
    if a.get("use_gate_in_kernel"):
        g = naive_gdn_gate(g, a["A_log"], a["dt_bias"], output_dtype=g.dtype)
    return OpResult(*naive_recurrent_gated_delta_rule(q, k, a["v"], _strength(a), g, None, _start(a), True))


def _kimi_delta(a: Arguments) -> OpResult:
    from fla.ops.kda.gate import naive_kda_gate, naive_kda_lowerbound_gate
    from fla.ops.kda.naive import naive_recurrent_kda

    g, (q, k), bound = a["g"], _normalised(a), a.get("lower_bound")
    if a.get("use_gate_in_kernel"):
        gate = naive_kda_gate if bound is None else naive_kda_lowerbound_gate
        options = {} if bound is None else {"lower_bound": bound}
        g = gate(g, a["A_log"], a["dt_bias"], **options, output_dtype=g.dtype)
    return OpResult(*naive_recurrent_kda(q, k, a["v"], g, _strength(a), None, _start(a), True))


def _gated_linear(a: Arguments) -> OpResult:
    from fla.ops.gla.naive import naive_recurrent_gla

    return OpResult(*naive_recurrent_gla(a["q"], a["k"], a["v"], a["gk" if "gk" in a else "g"], _start(a), True))


def _simple_gated_linear(a: Arguments) -> OpResult:
    from fla.ops.simple_gla.naive import naive_recurrent_simple_gla

    start = _start(a)
    return OpResult(*naive_recurrent_simple_gla(a["q"], a["k"], a["v"], a["g"], None, start, output_final_state=True))


def _retention(a: Arguments) -> OpResult:
    from fla.ops.retention.naive import naive_retention

    return OpResult(naive_retention(*_heads_first(a["q"], a["k"], a["v"])).transpose(1, 2), None)


def _rwkv6(a: Arguments) -> OpResult:
    """With the bonus at zero: it is outside the state."""
    from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6

    factors = _heads_first(*(a[name] for name in "rkvw"))
    outputs, state = naive_recurrent_rwkv6(*factors, torch.zeros_like(a["u"]), _scale(a), _start(a), True)
    return OpResult(outputs.transpose(1, 2), state)


def _rwkv7(a: Arguments) -> OpResult:
    """By the naive recurrence of the family that RWKV-7 is one of (diagonal plus low rank). It scales its reads."""
    from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence

    back, along = (-a["kk"], a["kk"] * a["a"]) if "kk" in a else (a["a"], a["b"])
    q = a["r"] * (_scale(a) * a["r"].shape[-1] ** 0.5)
    factors = _heads_first(q, a["k"], a["v"], back, along, a["w"])
    outputs, state = dplr_recurrence(*factors, _start(a))
    return OpResult(outputs.transpose(1, 2), state)


def _delta_product(a: Arguments) -> OpResult:
    """R tokens of the gated delta rule for one: the first decays, the last reads. (fla's own naive function of this
    rule hands its reads on in float32.)"""
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule

    (q, k), g, steps = _normalised(a), a["g"], a["num_householder"]
    q, g = _at_step(q, steps - 1, steps), None if g is None else _at_step(g, 0, steps)
    outputs, state = naive_recurrent_gated_delta_rule(q, k, a["v"], a["beta"], g, _scale(a), _start(a), True)
    return OpResult(outputs[:, steps - 1 :: steps], state)


def _at_step(x: Tensor, step: int, steps: int) -> Tensor:
    """[B,T,...] as [B,T*steps,...]: x at one step of each token, zeros at the others."""
    by_step = torch.zeros_like(x).repeat_interleave(steps, 1)
    by_step[:, step::steps] = x
    return by_step


def _comba(a: Arguments) -> OpResult:
    """As fla's kernels compute it; its ``naive_recurrent_comba`` decays what the erase reads, which is another rule."""
    heads = a["v"].shape[2]
    q, k = _normalised(a)
    p = a["k"] if a["p"] is None else a["p"]
    p = expand_groups(l2_normalise(p) if a["use_qk_l2norm_in_kernel"] else p, heads)
    state, outputs = _start(a), []
    if state is None:
        state = q.new_zeros(q.shape[0], heads, q.shape[-1], a["v"].shape[-1])
    for t in range(k.shape[1]):
        missing = a["v"][:, t] - torch.einsum("bhk,bhkv->bhv", p[:, t], state)
        write = torch.einsum("bhk,bhv->bhkv", k[:, t], a["beta"][:, t, :, None] * missing)
        state = state * a["g"][:, t].exp()[..., None, None] + write
        outputs.append(torch.einsum("bhk,bhkv->bhv", _scale(a) * q[:, t], state))
    return OpResult(torch.stack(outputs, 1), state)


def _normalised(a: Arguments) -> tuple[Tensor, Tensor]:
    """q and k as the kernel uses them, one for each value head where heads are grouped."""
    q, k = (l2_normalise(a[name]) if a["use_qk_l2norm_in_kernel"] else a[name] for name in "qk")
    heads = a["v"].shape[2]
    return expand_groups(q, heads), expand_groups(k, heads)


def _strength(a: Arguments) -> Tensor:
    if not a.get("use_beta_sigmoid_in_kernel"):
        return a["beta"]
    return (2 if a.get("allow_neg_eigval") else 1) * a["beta"].sigmoid()


def _scale(a: Arguments) -> float:
    """Factor on q at the read: K^-1/2 unless the call says otherwise."""
    return float(a["k"].shape[-1] ** -0.5 if a.get("scale") is None else a["scale"])


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """[B,H,T,...] from [B,T,H,...]."""
    return [x.transpose(1, 2) for x in tensors]


def _start(a: Arguments) -> Tensor | None:
    return initial_state(a, a["v"].dtype)


_ORACLES = {
    "chunk_delta_rule": Oracle(NAIVE, _delta),
    "chunk_gated_delta_rule": Oracle(NAIVE, _gated_delta),
    "chunk_kda": Oracle(NAIVE, _kimi_delta),
    "chunk_gla": Oracle(NAIVE, _gated_linear),
    "chunk_simple_gla": Oracle(NAIVE, _simple_gated_linear),
    "chunk_retention": Oracle("fla's naive parallel form", _retention),
    "chunk_rwkv6": Oracle(NAIVE, _rwkv6),
    "chunk_rwkv7": Oracle(NAIVE, _rwkv7),
    "rwkv7_recurrence": Oracle(NAIVE, _rwkv7),
    "chunk_gated_delta_product": Oracle(NAIVE, _delta_product),
    "chunk_comba": Oracle("the equation, written out", _comba),
}
