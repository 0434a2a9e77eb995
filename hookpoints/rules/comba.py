"""Comba (Hu et al., arXiv 2506.02475) in fla: the erase reads with a key of its own, and before the decay.

    S_t = alpha_t S_{t-1} + beta_t k_t (v_t - S_{t-1}^T p_t)^T,    o_t = S_t^T (K^-1/2 q_t)

with q, k and p l2-normalised inside the op and alpha one scalar per head. The layer makes p a multiple of k, so that
p differs from k by its norm alone, which the op takes away again; and q has D p taken off before it comes here. This is
what fla's kernels compute; its ``naive_recurrent_comba`` decays p and is another rule.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hookpoints.rules.base import Arguments, FlaRule, Names, OpFactors


class FlaComba(FlaRule):
    """The rule of fla's ``chunk_comba`` and ``fused_recurrent_comba``."""

    name = "Comba"
    ops = ("chunk_comba", "fused_recurrent_comba")
    names = Names("q", "k", "v", beta="beta", log_decay="g", back="p")
    rounded = frozenset({*FlaRule.rounded, "beta", "log_decay"})
    erases = True

    def read(self, field: str, arguments: Arguments, dtype: torch.dtype) -> Tensor | None:
        without_p = field == "back" and arguments["p"] is None
        return super().read("k" if without_p else field, arguments, dtype)

    def erase_key(self, factors: OpFactors) -> Tensor:
        assert factors.back is not None
        return factors.back
