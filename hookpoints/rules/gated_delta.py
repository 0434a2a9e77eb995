"""Gated DeltaNet (Yang et al., arXiv 2412.06464): Qwen3.5, Qwen3-Next, OLMo-hybrid, and fla's layers.

    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,    o_t = S_t^T (K^-1/2 q_t)

with q, k l2-normalised (eps 1e-6 inside the root) and alpha one scalar per head and token. Beta lies in (0, 1), or in
(0, 2) where the model allows negative eigenvalues (OLMo-hybrid). fla's kernels also make beta and alpha, as flags say.
"""

from __future__ import annotations

import torch

from hookpoints.rules.base import Arguments, FlaRule, Names, Rule


class GatedDelta(Rule):
    """The rule of transformers' ``torch_chunk_gated_delta_rule`` and ``torch_recurrent_gated_delta_rule``."""

    name = "Gated DeltaNet"
    ops = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
    companions = ("causal_conv1d_fn", "causal_conv1d_update")
    names = Names("query", "key", "value", beta="beta", log_decay="g")
    erases = True

    def output_dtype(self, arguments: Arguments) -> torch.dtype:
        return arguments["query"].dtype


class FlaGatedDelta(FlaRule):
    """The rule of fla's ``chunk_gated_delta_rule`` and ``fused_recurrent_gated_delta_rule``."""

    name = "Gated DeltaNet"
    ops = ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule")
    erases = True
