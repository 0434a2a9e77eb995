"""Tiny random models of fla's families; and what the oracle script runs on fla's kernels and the comparison on ours.

Needs torch and fla only, so that both environments can import it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[2] / "tests"))
from remembering import VOCAB, drawn_ids, remember

SHARED = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
# K != V everywhere but in RWKV-7, which fla cannot build so; grouped value heads where the family has them.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gated_deltanet": ("GatedDeltaNet", {"head_dim": 8, "expand_v": 2.0, "num_heads": 2, "num_v_heads": 4}),
    "delta_net": ("DeltaNet", {"num_heads": 2, "expand_k": 0.5, "expand_v": 1.0}),
    "gla": ("GLA", {"num_heads": 2, "expand_k": 0.5, "expand_v": 1.0}),
    "hgrn2": ("HGRN2", {"expand_ratio": 8, "hidden_size": 48}),
    "kda": ("KDA", {"head_dim": 8, "expand_v": 2.0, "num_heads": 2, "num_v_heads": 4}),
    "rwkv6": ("RWKV6", {"num_heads": 2, "expand_k": 0.5, "proj_low_rank_dim": 4, "gate_low_rank_dim": 6}),
    "rwkv7": (
        "RWKV7",
        {"head_dim": 16, "decay_low_rank_dim": 4, "gate_low_rank_dim": 6, "a_low_rank_dim": 5, "v_low_rank_dim": 7},
    ),
    "gated_deltaproduct": (
        "GatedDeltaProduct",
        {
            "head_dim": 8,
            "expand_v": 2.0,
            "num_heads": 2,
            "num_householder": 3,
            "use_forget_gate": True,
            "allow_neg_eigval": True,
        },
    ),
}
"""Model type -> the name that fla's classes begin with, and the fields of a tiny configuration."""

SMALLER: dict[str, dict[str, Any]] = {
    **{name: {"num_heads": 1, "num_v_heads": 2} for name in ("gated_deltanet", "kda")},
    "gated_deltaproduct": {"num_householder": 2},
    "hgrn2": {"hidden_size": 32, "expand_ratio": 16},
}
"""The interpreter takes each head and chunk by itself, so fewer of them save time."""
SCHEDULES = {"chunked": (5, 67, 1), "recurrent": (5, 60, 7, 1), "padded": (66, 1)}
"""Tokens of each pass, from the cache of the one before: from nothing, from a state, and one step of decoding.
fla takes its recurrent op up to 64 tokens (RWKV-7: 63) and its chunked one beyond."""
PADDING = 9
"""Tokens of padding before the second row of the padded schedule."""


class Pass(NamedTuple):
    """Arguments of one forward pass."""

    tokens: Tensor
    """[B,T]."""
    mask: Tensor | None
    """[B, tokens so far], 1 for real tokens; None where all are."""

    @property
    def real(self) -> Tensor:
        """[B,T] bool: the pass's own tokens that are no padding."""
        return torch.ones_like(self.tokens).bool() if self.mask is None else self.mask[:, -self.tokens.shape[1] :] == 1


def passes(schedule: str) -> list[Pass]:
    """The forward passes of a schedule, in order."""
    lengths = SCHEDULES[schedule]
    rows = 2 if schedule == "padded" else 1
    tokens = drawn_ids(rows, sum(lengths))
    mask = torch.ones_like(tokens)
    mask[1:, :PADDING] = 0
    ends = torch.tensor(lengths).cumsum(0).tolist()
    masks = [mask[:, :end] if rows > 1 else None for end in ends]
    return [Pass(*both) for both in zip(tokens.split(lengths, dim=1), masks, strict=True)]


def tiny(models: Any, model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A model of ``models``, the module ``fla.models``, whose heads remember: decays near 1, as in trained
    checkpoints."""
    name, own = FAMILIES[model_type]
    config = getattr(models, f"{name}Config")(**{**SHARED, **own, **changes})
    torch.manual_seed(seed)
    model = getattr(models, f"{name}ForCausalLM")(config).eval()
    remember(model)
    return model


def make(models: Any, model_type: str) -> Any:
    """A random model in float32, from the module ``fla.models``. Whatever begins at zero or one in training gets
    values, so that every part has an effect."""
    own = SMALLER.get(model_type, {})
    model = tiny(models, model_type, num_hidden_layers=2, fuse_cross_entropy=False, **own)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("dt_bias", "A_log")):
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model
