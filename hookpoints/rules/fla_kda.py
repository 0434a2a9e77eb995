"""Kimi delta attention (arXiv 2510.26692, eq. 1) in fla: the gated delta rule with one decay per key channel.

The kernel makes the log-decay from g as a flag says: -exp(A_log) softplus(g + dt_bias), or with a lower bound
lower_bound * sigmoid(exp(A_log) (g + dt_bias)).
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor

from hookpoints.rules.base import Factors
from hookpoints.rules.fla_gated_delta import FlaGatedDelta, gate


class FlaKimiDelta(FlaGatedDelta):
    """The rule of fla's ``chunk_kda`` and ``fused_recurrent_kda``."""

    name = "Kimi delta attention"
    ops = ("chunk_kda", "fused_recurrent_kda")

    def log_decay(self, arguments: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
        """[B,T,H,K] natural log of the decay."""
        g = arguments["g"].to(dtype)
        if not arguments.get("use_gate_in_kernel"):
            return g
        a_log, bias, bound = (arguments.get(name) for name in ("A_log", "dt_bias", "lower_bound"))
        a_log = None if a_log is None else a_log.reshape(-1, 1)  # [H,1]
        bias = None if bias is None else bias.reshape(g.shape[-2:])
        if bound is None:
            assert a_log is not None
            return gate(g, a_log, bias)
        g = g if bias is None else g + bias.to(dtype)
        return bound * (g if a_log is None else a_log.to(dtype).exp() * g).sigmoid()

    def fed(self, arguments: Mapping[str, Any], factors: Factors, changed: Set[str]) -> dict[str, Any]:
        given = super().fed(arguments, factors, changed)
        if "log_decay" in changed:  # an edited decay may leave the range that these promise
            given |= {name: value for name, value in (("safe_gate", False), ("lower_bound", None)) if name in arguments}
        return given
