"""Tiny random models whose heads remember, for processes that know nothing of hookpoints as well."""

from __future__ import annotations

import torch

VOCAB = 64
"""Of every tiny model."""


def drawn_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    """Token ids of a shape, none of them padding."""
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def remember(model: torch.nn.Module) -> None:
    """Give a random model decays near 1, and weights that move its logits."""
    for name, parameter in model.named_parameters():
        if name.endswith(("dt_bias", "dt_proj.bias")):
            parameter.copy_(torch.linspace(-6.0, -2.0, parameter.numel()).view_as(parameter))
        elif name.endswith("A_log"):
            parameter.copy_(torch.linspace(0.0, 1.5, parameter.numel()).view_as(parameter))
        elif parameter.ndim == 2 and "norm" not in name:
            if not parameter.any():  # fla's RWKV-7's output projections
                parameter.normal_(std=0.05)
            parameter.mul_(4.0)  # random weights of std 0.02 barely move the logits
