"""Linear attention with one decay per head, in fla: SimpleGLA (arXiv 2312.06635, the rule of Mamba-2 and RetNet's).

    S_t = alpha_t S_{t-1} + k_t v_t^T,    o_t = S_t^T (scale q_t)

In SimpleGLA the decay depends on the token; in RetNet (arXiv 2307.08621) head h always decays by 1 - 2^(-5-h), which
its ops know and take no argument for.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor

from hookpoints.recurrence.recurrence import Recurrence
from hookpoints.rules.base import Factors, compute_dtype
from hookpoints.rules.fla_base import FlaRule, initial_state, scale_of


class FlaSimpleGatedLinear(FlaRule):
    """The rule of fla's ``chunk_simple_gla``, ``fused_recurrent_simple_gla`` and ``fused_chunk_simple_gla``."""

    name = "SimpleGLA"
    ops: tuple[str, ...] = ("chunk_simple_gla", "fused_recurrent_simple_gla", "fused_chunk_simple_gla")
    factor_names: tuple[str, ...] = ("q", "k", "v", "log_decay")

    def factors(self, arguments: Mapping[str, Any]) -> Factors:
        dtype = compute_dtype(arguments["v"])
        q, k, v = (arguments[name].to(dtype) for name in "qkv")
        decay = self.log_decay(arguments).to(dtype).expand(v.shape[:3])
        return Factors(q, k, v, log_decay=decay, initial_state=initial_state(arguments, dtype))

    def log_decay(self, arguments: Mapping[str, Any]) -> Tensor:
        """[B,T,H], or [H] where it is the same at every token."""
        g, constant = arguments.get("g"), arguments.get("g_gamma")
        if g is not None:
            return g
        return arguments["v"].new_zeros(()) if constant is None else constant

    def fed(self, arguments: Mapping[str, Any], factors: Factors, changed: Set[str]) -> dict[str, Any]:
        given: dict[str, Any] = {name: getattr(factors, name) for name in "qkv" if name in changed}
        return given | ({"g": factors.log_decay, "g_gamma": None} if "log_decay" in changed else {})

    def recurrence(self, factors: Factors, arguments: Mapping[str, Any]) -> Recurrence:
        return Recurrence(
            q=factors.q,
            k=factors.k,
            u=factors.v,
            log_decay=factors.log_decay,
            scale=scale_of(arguments),
            initial_state=factors.initial_state,
        )


class FlaRetention(FlaSimpleGatedLinear):
    """The rule of fla's ``chunk_retention``, ``fused_chunk_retention``, ``parallel_retention`` and
    ``fused_recurrent_retention``."""

    name = "RetNet"
    ops = ("chunk_retention", "fused_recurrent_retention", "fused_chunk_retention", "parallel_retention")
    torch_only = frozenset({"log_decay"})

    def log_decay(self, arguments: Mapping[str, Any]) -> Tensor:
        heads = torch.arange(arguments["q"].shape[2], dtype=torch.float64, device=arguments["q"].device)
        return torch.log1p(-(2.0 ** (-5.0 - heads)))

    def fed(self, arguments: Mapping[str, Any], factors: Factors, changed: Set[str]) -> dict[str, Any]:
        return {name: getattr(factors, name) for name in "qkv" if name in changed}

    def wants_state(self, arguments: Mapping[str, Any]) -> bool:
        return bool(arguments.get("output_final_state"))  # parallel_retention gives none
