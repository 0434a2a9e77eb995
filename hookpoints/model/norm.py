"""A norm as a linear map, its scale held fixed: what each part of a residual stream contributes behind it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hookpoints.errors import UnsupportedModelError


@dataclass(frozen=True, eq=False)
class Norm:
    """y = gain * (x - mean) / scale + bias; the mean is taken off by a LayerNorm and not by an RMSNorm."""

    gain: Tensor
    """[D]."""
    bias: Tensor
    """[D], zero where the norm has none."""
    centered: bool
    eps: float

    @classmethod
    @torch.no_grad()
    def of(cls, module: nn.Module) -> Norm:
        """Read a norm off what it does to three vectors: families differ in what they call a weight (Qwen3.5's is added
        to one)."""
        eps = eps_of(module)
        weight = next(module.parameters(), None)
        if eps is None or weight is None or weight.ndim != 1:
            raise UnsupportedModelError(f"{type(module).__name__} is not known here as a norm over the model's width")
        ones = torch.ones(1, 1, weight.numel(), device=weight.device, dtype=weight.dtype)
        probe = ones.clone()
        probe[..., 1::2] = -1
        # The class's forward: the instance's own may have hooks around it.
        forward = type(module).forward
        bias = forward(module, 0 * ones)
        level = forward(module, ones)
        answer = forward(module, probe)
        centered = bool(torch.allclose(level, bias))
        norm = cls(torch.ones_like(bias[0, 0]), torch.zeros_like(bias[0, 0]), centered, eps)
        # The probe's entries are 1 and -1, so that no channel's gain is a division by zero.
        gain = (answer - bias) / norm.frozen(probe, norm.scale(probe))
        return cls(gain[0, 0], bias[0, 0], centered, eps)

    def scale(self, x: Tensor) -> Tensor:
        """[...,1], what the norm divides ``x`` [...,D] by; in float32 at least."""
        x = self._centered_input(x if x.dtype == torch.float64 else x.float())
        return (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def frozen(self, x: Tensor, scale: Tensor) -> Tensor:
        """The linear part at a given scale: parts of a stream add up to what the norm makes of it, less its bias."""
        return (self._centered_input(x) / scale).to(x.dtype) * self.gain

    def _centered_input(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centered else x


def eps_of(module: nn.Module) -> float | None:
    """What a norm adds to the mean square, or None where it does not say."""
    values = (getattr(module, name, None) for name in ("eps", "variance_epsilon", "norm_eps"))
    return next((value for value in values if isinstance(value, float)), None)
