"""Linear attention with one decay per head, in fla: SimpleGLA (arXiv 2312.06635, the rule of Mamba-2 and RetNet's).

    S_t = alpha_t S_{t-1} + k_t v_t^T,    o_t = S_t^T (scale q_t)

In SimpleGLA the decay depends on the token; in RetNet (arXiv 2307.08621) head h always decays by 1 - 2^(-5-h), which
its ops know and take no argument for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hookpoints.rules.base import Arguments, FlaRule, Names


class FlaSimpleGatedLinear(FlaRule):
    """The rule of fla's ``chunk_simple_gla``, ``fused_recurrent_simple_gla`` and ``fused_chunk_simple_gla``."""

    name = "SimpleGLA"
    ops = ("chunk_simple_gla", "fused_recurrent_simple_gla", "fused_chunk_simple_gla")
    names = Names("q", "k", "v", log_decay="g")

    def read(self, field: str, arguments: Arguments, dtype: torch.dtype) -> Tensor | None:
        if field != "log_decay":
            return super().read(field, arguments, dtype)
        return self.log_decay(arguments).to(dtype).expand(arguments["v"].shape[:3])

    def log_decay(self, arguments: Arguments) -> Tensor:
        """[B,T,H], or [H] where it is the same at every token."""
        g, constant = arguments.get("g"), arguments.get("g_gamma")
        if g is not None:
            return g
        return arguments["v"].new_zeros(()) if constant is None else constant


class FlaRetention(FlaSimpleGatedLinear):
    """The rule of fla's ``chunk_retention``, ``fused_chunk_retention``, ``parallel_retention`` and
    ``fused_recurrent_retention``. No op takes another decay, so one is never fed."""

    name = "RetNet"
    ops = ("chunk_retention", "fused_recurrent_retention", "fused_chunk_retention", "parallel_retention")
    torch_only = frozenset({"log_decay"})

    def log_decay(self, arguments: Arguments) -> Tensor:
        heads = torch.arange(arguments["q"].shape[2], dtype=torch.float64, device=arguments["q"].device)
        return torch.log1p(-(2.0 ** (-5.0 - heads)))
