"""Rules that differ in a table, or in one step of the way between an op's arguments and the canonical form."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace

import torch
from torch import nn

from hookpoints.rules.base import CONVOLUTIONS, Arguments, FlaRule, Names, OpFactors, OpResult, Rule, compute_dtype

_OF_TRANSFORMERS = Names("query", "key", "value", beta="beta", log_decay="g")

# -- the delta rules: a token takes off what its key reads back before it writes

GATED_DELTA = Rule(
    "Gated DeltaNet",
    ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"),
    _OF_TRANSFORMERS,
    companions=CONVOLUTIONS,
    output_like="q",
    erases=True,
)
"""Gated DeltaNet (Yang et al., arXiv 2412.06464): Qwen3.5, Qwen3-Next, OLMo-hybrid.

    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,    o_t = S_t^T (K^-1/2 q_t)

with q, k l2-normalized (eps 1e-6 inside the root) and alpha one scalar per head and token. Beta lies in (0, 1), or in
(0, 2) where the model allows negative eigenvalues (OLMo-hybrid). fla's kernels also make beta and alpha, as flags say.
"""
FLA_GATED_DELTA = FlaRule("Gated DeltaNet", ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"), erases=True)
KIMI_DELTA = Rule(
    "Kimi delta attention",
    ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"),
    _OF_TRANSFORMERS,
    sizes=("head_dim", "head_dim"),
    companions=CONVOLUTIONS,
    output_like="q",
    erases=True,
)
"""Kimi delta attention (Kimi Linear, arXiv 2510.26692, eq. 1): Kimi Linear, Bailing hybrid.

    S_t = (I - beta_t k_t k_t^T) diag(alpha_t) S_{t-1} + beta_t k_t v_t^T,    o_t = S_t^T (K^-1/2 q_t)

The gated delta rule with one decay per key channel instead of one per head: the log-decay is [B,T,H,K].
"""
FLA_KIMI_DELTA = FlaRule("Kimi delta attention", ("chunk_kda", "fused_recurrent_kda"), erases=True)
FLA_DELTA = FlaRule(
    "DeltaNet",
    ("chunk_delta_rule", "fused_recurrent_delta_rule"),
    Names("q", "k", "v", beta="beta"),
    refuses_float32=frozenset({"chunk_delta_rule"}),
    erases=True,
)
"""DeltaNet (Yang et al., arXiv 2406.06484), without decay.

    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,    o_t = S_t^T (scale q_t)
"""


# -- additive rules


class _GatedLinear(FlaRule):
    def for_mixer(self, mixer: nn.Module) -> Rule:
        if not hasattr(mixer, "head_f_dim"):
            return self
        return replace(self, name="HGRN2", sizes=("head_f_dim", "head_i_dim"), norm_linear=("rms_norm_linear",))

    def argument(self, field: str, arguments: Arguments) -> str:
        """The recurrent op calls the decay ``gk``."""
        if field == "log_decay" and "gk" in arguments:
            return "gk"
        return super().argument(field, arguments)


FLA_GLA = _GatedLinear("GLA", ("chunk_gla", "fused_recurrent_gla"), Names("q", "k", "v", log_decay="g"))
"""Gated linear attention (Yang et al., arXiv 2312.06635, eq. 3); HGRN2 (arXiv 2404.07904) calls the same ops.

    S_t = diag(alpha_t) S_{t-1} + k_t v_t^T,    o_t = S_t^T (scale q_t)

with one decay per key channel. In HGRN2 the keys are tied to the decays, k = 1 - alpha, and its layer names the sides
of the state forget (key) and input (value).
"""


class _RWKV6(FlaRule):
    def arguments(self, arguments: Arguments, factors: OpFactors, changed: Set[str]) -> Arguments:
        return {**super().arguments(arguments, factors, changed), "u": torch.zeros_like(arguments["u"])}

    def write_result(self, result: OpResult, arguments: Arguments) -> object:
        dtype = compute_dtype(arguments["v"])
        r = arguments["r"].to(dtype)
        k = arguments["k"].to(dtype)
        v = arguments["v"].to(dtype)
        bonus = arguments["u"].to(dtype)
        scale = k.shape[-1] ** -0.5 if arguments.get("scale") is None else float(arguments["scale"])
        itself = scale * (r * bonus * k).sum(-1, keepdim=True) * v
        outputs = (result.outputs.to(itself.dtype) + itself).to(result.outputs.dtype)
        return super().write_result(result._replace(outputs=outputs), arguments)


FLA_RWKV6 = _RWKV6(
    "RWKV-6",
    ("chunk_rwkv6", "fused_recurrent_rwkv6"),
    Names("r", "k", "v", log_decay="w"),
    rounded=frozenset({"q", "k", "v", "back", "log_decay"}),
    read_before_write=True,
)
"""RWKV-6 (Peng et al., arXiv 2404.05892, section 4): a token reads the state before it writes.

    o_t = S_{t-1}^T r_t + <r_t, bonus * k_t> v_t,    S_t = diag(alpha_t) S_{t-1} + k_t v_t^T

with one decay per key channel. So a write, and an edit of it, is read from the next token on. What a token sees of
itself, the bonus, is not in the state: it is left out of the op and put back by ``write_result``, so that ``hook_read``
has S^T r alone and the bonus stays what the layer's own r, k and v make it.
"""
