"""Kimi delta attention (Kimi Linear, arXiv 2510.26692, eq. 1): Kimi Linear, Bailing hybrid, and fla's layers.

    S_t = (I - beta_t k_t k_t^T) diag(alpha_t) S_{t-1} + beta_t k_t v_t^T,    o_t = S_t^T (K^-1/2 q_t)

The gated delta rule with one decay per key channel instead of one per head: the log-decay is [B,T,H,K].
"""

from __future__ import annotations

import torch

from hookpoints.rules.base import Arguments, FlaRule, Names, Rule


class KimiDelta(Rule):
    """The rule of transformers' ``chunk_kimi_delta_attention`` and ``recurrent_kimi_delta_attention``."""

    name = "Kimi delta attention"
    ops = ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention")
    companions = ("causal_conv1d_fn", "causal_conv1d_update")
    names = Names("query", "key", "value", beta="beta", log_decay="g")
    sizes = ("head_dim", "head_dim")
    erases = True

    def output_dtype(self, arguments: Arguments) -> torch.dtype:
        return arguments["query"].dtype


class FlaKimiDelta(FlaRule):
    """The rule of fla's ``chunk_kda`` and ``fused_recurrent_kda``."""

    name = "Kimi delta attention"
    ops = ("chunk_kda", "fused_recurrent_kda")
    erases = True
