"""Gated DeltaNet (arXiv 2412.06464) in fla.

    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,    o_t = S_t^T (scale q_t)

The kernel does much of the layer's work, as flags of the call say: it l2-normalises q and k, takes the sigmoid of beta
(times 2 where negative eigenvalues are allowed), and makes the log-decay -exp(A_log) softplus(g + dt_bias) of g.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hookpoints.recurrence.recurrence import Recurrence
from hookpoints.rules.base import Factors, compute_dtype, expand_groups, l2_normalise
from hookpoints.rules.fla_base import FlaRule, initial_state, scale_of


class FlaGatedDelta(FlaRule):
    """The rule of fla's ``chunk_gated_delta_rule`` and ``fused_recurrent_gated_delta_rule``."""

    name = "Gated DeltaNet"
    ops: tuple[str, ...] = ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule")
    factor_names: tuple[str, ...] = ("q", "k", "v", "beta", "log_decay")

    def factors(self, arguments: Mapping[str, Any]) -> Factors:
        dtype, heads = compute_dtype(arguments["v"]), arguments["v"].shape[2]
        q, k, v = (arguments[name].to(dtype) for name in "qkv")
        if arguments["use_qk_l2norm_in_kernel"]:
            q, k = l2_normalise(q), l2_normalise(k)
        return Factors(
            q=expand_groups(q, heads),
            k=expand_groups(k, heads),
            v=v,
            beta=_strength(arguments, dtype),
            log_decay=self.log_decay(arguments, dtype),
            initial_state=initial_state(arguments, dtype),
        )

    def log_decay(self, arguments: Mapping[str, Any], dtype: torch.dtype) -> Tensor | None:
        """[B,T,H] natural log of the decay."""
        g = arguments["g"].to(dtype)
        return gate(g, arguments["A_log"], arguments["dt_bias"]) if arguments.get("use_gate_in_kernel") else g

    def fed(self, arguments: Mapping[str, Any], factors: Factors, changed: Set[str]) -> dict[str, Any]:
        given: dict[str, Any] = {}
        if changed & {"q", "k"}:  # one flag normalises both inside the kernel
            given |= {"q": factors.q, "k": factors.k, "use_qk_l2norm_in_kernel": False}
        if "v" in changed:
            given["v"] = factors.v
        if "beta" in changed:
            given |= {"beta": factors.beta, "use_beta_sigmoid_in_kernel": False, "allow_neg_eigval": False}
        if "log_decay" in changed:
            given |= {"g": factors.log_decay, "use_gate_in_kernel": False, "A_log": None, "dt_bias": None}
        return {name: x for name, x in given.items() if name in arguments}

    def recurrence(self, factors: Factors, arguments: Mapping[str, Any]) -> Recurrence:
        assert factors.beta is not None
        k, decay = factors.k, factors.log_decay
        alpha = None if decay is None else decay.exp() if decay.ndim == k.ndim else decay.exp().unsqueeze(-1)
        return Recurrence(
            q=factors.q,
            k=k,
            u=factors.beta.unsqueeze(-1) * factors.v,
            log_decay=decay,
            beta=factors.beta,  # the erase is -beta k
            b=k if alpha is None else alpha * k,
            scale=scale_of(arguments),
            initial_state=factors.initial_state,
        )


def gate(g: Tensor, a_log: Tensor, bias: Tensor | None) -> Tensor:
    """-exp(A_log) softplus(g + bias); ``a_log`` and ``bias`` broadcast over g."""
    g = g if bias is None else g + bias.to(g.dtype)
    return -a_log.to(g.dtype).exp() * F.softplus(g)


def _strength(arguments: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    """[B,T,H] beta; 1 where the call gives none."""
    beta = arguments["beta"]
    if beta is None:
        return torch.ones_like(arguments["v"][..., 0], dtype=dtype)
    beta = beta.to(dtype)
    if arguments.get("use_beta_sigmoid_in_kernel"):
        beta = beta.sigmoid()
    return 2 * beta if arguments.get("allow_neg_eigval") else beta
