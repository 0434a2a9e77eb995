"""Gated linear attention (Yang et al., arXiv 2312.06635, eq. 3) in fla; HGRN2 (arXiv 2404.07904) calls the same ops.

    S_t = diag(alpha_t) S_{t-1} + k_t v_t^T,    o_t = S_t^T (scale q_t)

with one decay per key channel. In HGRN2 the keys are tied to the decays, k = 1 - alpha, and its layer has names of its
own for the sides of the state: forget (key) and input (value).
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from torch import nn

from hookpoints.recurrence.recurrence import Recurrence
from hookpoints.rules.base import Factors, compute_dtype
from hookpoints.rules.fla_base import FlaRule, initial_state, scale_of


class FlaGatedLinear(FlaRule):
    """The rule of fla's ``chunk_gla`` and ``fused_recurrent_gla``."""

    name = "GLA"
    ops: tuple[str, ...] = ("chunk_gla", "fused_recurrent_gla")
    factor_names: tuple[str, ...] = ("q", "k", "v", "log_decay")

    def for_mixer(self, mixer: nn.Module) -> FlaGatedLinear:
        return FlaHgrn2() if hasattr(mixer, "head_f_dim") else self

    def factors(self, arguments: Mapping[str, Any]) -> Factors:
        dtype = compute_dtype(arguments["v"])
        decay = arguments["gk" if "gk" in arguments else "g"]
        q, k, v = (arguments[name].to(dtype) for name in "qkv")
        return Factors(q, k, v, log_decay=decay.to(dtype), initial_state=initial_state(arguments, dtype))

    def fed(self, arguments: Mapping[str, Any], factors: Factors, changed: Set[str]) -> dict[str, Any]:
        names = {"q": "q", "k": "k", "v": "v", "log_decay": "gk" if "gk" in arguments else "g"}
        return {names[field]: getattr(factors, field) for field in changed}

    def recurrence(self, factors: Factors, arguments: Mapping[str, Any]) -> Recurrence:
        return Recurrence(
            q=factors.q,
            k=factors.k,
            u=factors.v,
            log_decay=factors.log_decay,
            scale=scale_of(arguments),
            initial_state=factors.initial_state,
        )


class FlaHgrn2(FlaGatedLinear):
    """GLA's rule as HGRN2's layer calls it."""

    name = "HGRN2"

    def head_shape(self, mixer: nn.Module) -> tuple[int, int, int]:
        return mixer.num_heads, mixer.head_f_dim, mixer.head_i_dim  # type: ignore[return-value]
