"""DeltaNet (Yang et al., arXiv 2406.06484) in fla: the gated delta rule without decay.

S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,    o_t = S_t^T (scale q_t)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from hookpoints.rules.fla_gated_delta import FlaGatedDelta


class FlaDelta(FlaGatedDelta):
    """The rule of fla's ``chunk_delta_rule`` and ``fused_recurrent_delta_rule``. States are key-first here."""

    name = "DeltaNet"
    ops = ("chunk_delta_rule", "fused_recurrent_delta_rule")
    factor_names = ("q", "k", "v", "beta")

    def runs(self, op: Callable[..., Any], arguments: Mapping[str, Any]) -> bool:
        """The chunk kernel takes no float32; those calls are hookpoints' own kernel's on a GPU, too."""
        refused = op.__name__ == "chunk_delta_rule" and arguments["q"].dtype == torch.float32
        return super().runs(op, arguments) and not refused

    def log_decay(self, arguments: Mapping[str, Any], dtype: torch.dtype) -> None:
        return None
