"""Rules that differ in a table, or in one step of the way between an op's arguments and the canonical form."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace

import torch
from torch import Tensor, nn

from hookpoints.recurrence.canonical import CanonicalForm
from hookpoints.rules.base import CONVOLUTIONS, Arguments, FlaRule, Names, OpFactors, OpResult, Rule, compute_dtype

_OF_TRANSFORMERS = Names("query", "key", "value", beta="beta", log_decay="g")
_WITHOUT_BETA = Names("q", "k", "v", log_decay="g")

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


class _GatedDelta2(FlaRule):
    def read(self, field: str, arguments: Arguments, dtype: torch.dtype) -> Tensor | None:
        if field == "back":
            return arguments["b"].to(dtype)
        return super().read(field, arguments, dtype)

    def erase_key(self, factors: OpFactors) -> Tensor:
        assert factors.back is not None
        return factors.back * super().erase_key(factors)

    def form(self, factors: OpFactors, arguments: Arguments) -> CanonicalForm:
        return (
            super().form(factors, arguments).replace(beta=torch.ones_like(factors.k[..., 0]), b=self.erase_key(factors))
        )


FLA_GATED_DELTA_2 = _GatedDelta2(
    "Gated DeltaNet-2",
    ("chunk_gdn2", "fused_recurrent_gdn2"),
    Names("q", "k", "v", beta="w", log_decay="g", back="b"),
    own_erase=True,
)
"""Gated DeltaNet-2 (fla's layer ``GatedDeltaNet2``): a gate b for each key channel says what is erased, and a gate w
for each value channel what is written.

    S_t = (I - k_t (b_t * k_t)^T) diag(alpha_t) S_{t-1} + k_t (w_t * v_t)^T,    o_t = S_t^T (K^-1/2 q_t)

with q, k l2-normalized inside the op and one decay per key channel. w is beta, [B,T,H,V]. An edit of k moves the
erase b * k as well. With b = w = beta it is Kimi delta attention.
"""


class _Comba(FlaRule):
    def read(self, field: str, arguments: Arguments, dtype: torch.dtype) -> Tensor | None:
        return super().read("k" if field == "back" and arguments["p"] is None else field, arguments, dtype)

    def erase_key(self, factors: OpFactors) -> Tensor:
        assert factors.back is not None
        return factors.back


FLA_COMBA = _Comba(
    "Comba",
    ("chunk_comba", "fused_recurrent_comba"),
    Names("q", "k", "v", beta="beta", log_decay="g", back="p"),
    rounded=frozenset({"q", "k", "v", "back", "beta", "log_decay"}),
    erases=True,
)
"""Comba (Hu et al., arXiv 2506.02475): the erase reads with its own key, and before the decay.

    S_t = alpha_t S_{t-1} + beta_t k_t (v_t - S_{t-1}^T p_t)^T,    o_t = S_t^T (K^-1/2 q_t)

with q, k and p l2-normalized inside the op and alpha one scalar per head. The layer makes p a multiple of k, so that
p differs from k by its norm alone, which the op takes away again; and q has D p taken off before it comes here. This is
what fla's kernels compute; its ``naive_recurrent_comba`` decays p and is another rule.
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


FLA_GLA = _GatedLinear("GLA", ("chunk_gla", "fused_recurrent_gla"), _WITHOUT_BETA)
"""Gated linear attention (Yang et al., arXiv 2312.06635, eq. 3); HGRN2 (arXiv 2404.07904) calls the same ops.

    S_t = diag(alpha_t) S_{t-1} + k_t v_t^T,    o_t = S_t^T (scale q_t)

with one decay per key channel. In HGRN2 the keys are tied to the decays, k = 1 - alpha, and its layer names the sides
of the state forget (key) and input (value).
"""


class _SimpleGatedLinear(FlaRule):
    def read(self, field: str, arguments: Arguments, dtype: torch.dtype) -> Tensor | None:
        if field != "log_decay":
            return super().read(field, arguments, dtype)
        return self.log_decay(arguments).to(dtype).expand(arguments["v"].shape[:3])

    def log_decay(self, arguments: Arguments) -> Tensor:
        """[B,T,H], or [H] where it is the same at every token."""
        # One for each token, one for each head, or none.
        for name in ("g", "g_gamma"):
            if arguments.get(name) is not None:
                return arguments[name]
        return arguments["v"].new_zeros(())


class _Retention(_SimpleGatedLinear):
    def log_decay(self, arguments: Arguments) -> Tensor:
        heads = torch.arange(arguments["q"].shape[2], dtype=torch.float64, device=arguments["q"].device)
        return torch.log1p(-(2.0 ** (-5.0 - heads)))


FLA_SIMPLE_GLA = _SimpleGatedLinear(
    "SimpleGLA", ("chunk_simple_gla", "fused_recurrent_simple_gla", "fused_chunk_simple_gla"), _WITHOUT_BETA
)
"""Linear attention with one decay per head: SimpleGLA (arXiv 2312.06635, the rule of Mamba-2 and RetNet's).

    S_t = alpha_t S_{t-1} + k_t v_t^T,    o_t = S_t^T (scale q_t)
"""
FLA_RETENTION = _Retention(
    "RetNet",
    ("chunk_retention", "fused_recurrent_retention", "fused_chunk_retention", "parallel_retention"),
    _WITHOUT_BETA,
    torch_only=frozenset({"log_decay"}),
)
"""RetNet (arXiv 2307.08621): head h always decays by 1 - 2^(-5-h), which its ops know and take no argument for, so that
another decay is never fed."""


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
