"""What the oracle script runs on fla's kernels and the comparison on ours: models, tokens, passes.

Needs torch and fla only, so that both environments can import it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[2] / "tests"))
import fla_families

SMALLER: dict[str, dict[str, Any]] = {
    **{name: {"num_heads": 1, "num_v_heads": 2} for name in ("gated_deltanet", "gated_deltanet2", "kda", "comba")},
    "gated_deltaproduct": {"num_householder": 2},
    "hgrn2": {"hidden_size": 32, "expand_ratio": 16},
}
"""The interpreter takes each head and chunk by itself, so fewer of them save time."""

FAMILIES = tuple(fla_families.OWN)
"""Model types that are run as whole models."""
SCHEDULES = {"chunked": (5, 67, 1), "recurrent": (5, 60, 7, 1), "padded": (66, 1)}
"""Tokens of each pass, from the cache of the one before: from nothing, from a state, and one step of decoding.
fla takes its recurrent op up to 64 tokens (RWKV-7: 63) and its chunked one beyond."""
PADDING = 9
"""Tokens of padding before the second row of the padded schedule."""
OPS = ("chunked", "recurrent")
"""Of SimpleGLA, which is run as an op."""


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
    tokens = torch.randint(1, fla_families.VOCAB, (rows, sum(lengths)), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1:, :PADDING] = 0
    ends = torch.tensor(lengths).cumsum(0).tolist()
    masks = [mask[:, :end] if rows > 1 else None for end in ends]
    return [Pass(*both) for both in zip(tokens.split(lengths, dim=1), masks, strict=True)]


def make(models: Any, model_type: str) -> Any:
    """A random model in float32, from the module ``fla.models``. Whatever begins at zero or one in training gets
    values, so that every part has an effect."""
    own = SMALLER.get(model_type, {})
    model = fla_families.make(models, model_type, num_hidden_layers=2, fuse_cross_entropy=False, **own)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("dt_bias", "A_log")):
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def simple_gla_call() -> dict[str, Any]:
    """SimpleGLA is an op and a layer of fla without a model of its own: one call, with a state to begin with."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "q": normal(1, 67, 2, 8),
        "k": normal(1, 67, 2, 8),
        "v": normal(1, 67, 2, 16),
        "g": -torch.nn.functional.softplus(normal(1, 67, 2)),
        "initial_state": normal(1, 2, 8, 16),
        "output_final_state": True,
    }
