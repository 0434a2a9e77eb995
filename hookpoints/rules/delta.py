"""DeltaNet (Yang et al., arXiv 2406.06484) in fla: the delta rule, without decay.

S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,    o_t = S_t^T (scale q_t)
"""

from __future__ import annotations

import torch

from hookpoints.rules.base import Arguments, FlaRule, Names, Op


class FlaDelta(FlaRule):
    """The rule of fla's ``chunk_delta_rule`` and ``fused_recurrent_delta_rule``."""

    name = "DeltaNet"
    ops = ("chunk_delta_rule", "fused_recurrent_delta_rule")
    names = Names("q", "k", "v", beta="beta")
    erases = True

    def runs(self, op: Op, arguments: Arguments) -> bool:
        """The chunk kernel takes no float32; those calls are hookpoints' own kernel's on a GPU, too."""
        refused = op.__name__ == "chunk_delta_rule" and arguments["q"].dtype == torch.float32
        return super().runs(op, arguments) and not refused
