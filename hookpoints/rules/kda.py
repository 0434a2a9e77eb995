"""Kimi delta attention (Kimi Linear, arXiv 2510.26692, eq. 1): Kimi Linear, Bailing hybrid.

    S_t = (I - beta_t k_t k_t^T) diag(alpha_t) S_{t-1} + beta_t k_t v_t^T,    o_t = S_t^T (K^-1/2 q_t)

The gated delta rule with one decay per key channel instead of one per head: the log-decay is [B,T,H,K].
"""

from __future__ import annotations

from torch import nn

from hookpoints.rules.gated_delta import GatedDelta


class KimiDelta(GatedDelta):
    """The rule of transformers' ``chunk_kimi_delta_attention`` and ``recurrent_kimi_delta_attention``."""

    name = "Kimi delta attention"
    ops = ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention")

    def head_shape(self, mixer: nn.Module) -> tuple[int, int, int]:
        return mixer.num_heads, mixer.head_dim, mixer.head_dim  # type: ignore[return-value]
