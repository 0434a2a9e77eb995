"""Gated linear attention (Yang et al., arXiv 2312.06635, eq. 3) in fla; HGRN2 (arXiv 2404.07904) calls the same ops.

    S_t = diag(alpha_t) S_{t-1} + k_t v_t^T,    o_t = S_t^T (scale q_t)

with one decay per key channel. In HGRN2 the keys are tied to the decays, k = 1 - alpha, and its layer has names of its
own for the sides of the state: forget (key) and input (value).
"""

from __future__ import annotations

from torch import nn

from hookpoints.rules.base import Arguments, FlaRule, Names


class FlaGatedLinear(FlaRule):
    """The rule of fla's ``chunk_gla`` and ``fused_recurrent_gla``."""

    name = "GLA"
    ops = ("chunk_gla", "fused_recurrent_gla")
    names = Names("q", "k", "v", log_decay="g")

    def for_mixer(self, mixer: nn.Module) -> FlaGatedLinear:
        return FlaHgrn2() if hasattr(mixer, "head_f_dim") else self

    def argument(self, field: str, arguments: Arguments) -> str:
        """The recurrent op calls the decay ``gk``."""
        return "gk" if field == "log_decay" and "gk" in arguments else super().argument(field, arguments)


class FlaHgrn2(FlaGatedLinear):
    """GLA's rule as HGRN2's layer calls it."""

    name = "HGRN2"
    sizes = ("head_f_dim", "head_i_dim")
    norm_linear = ("rms_norm_linear",)
