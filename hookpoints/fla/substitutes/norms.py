"""fla's fused norms in plain torch: LayerNorm, RMSNorm, GroupNorm, with a residual, a gate or a projection fused in.

As the kernels do, the work is done in float32 (float64 stays) and results are rounded once, to the input's dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hookpoints.fla.substitutes.numbers import working_dtype

Prenorm = Tensor | tuple[Tensor, Tensor]
"""The normalised tensor, or with ``prenorm`` also the sum that was normalised: the residual stream."""


class _Summed(NamedTuple):
    """What is to be normalised."""

    working: Tensor
    """x + residual in the working dtype."""
    residual: Tensor
    """The same as it goes on."""


def _sum(x: Tensor, residual: Tensor | None, residual_in_fp32: bool) -> _Summed:
    working = x.to(working_dtype(x))
    if residual is None:
        return _Summed(working, x.float() if residual_in_fp32 and x.dtype != torch.float64 else x)
    working = working + residual.to(working.dtype)
    return _Summed(working, working.to(residual.dtype))


def _normalised(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, is_rms_norm: bool, num_groups: int = 1
) -> Tensor:
    shape, x = x.shape, x.unflatten(-1, (num_groups, -1))
    if not is_rms_norm:
        x = x - x.mean(-1, keepdim=True)
    x = (x / (x.square().mean(-1, keepdim=True) + eps).sqrt()).reshape(shape)
    if weight is not None:
        x = x * weight.to(x.dtype)
    return x if bias is None else x + bias.to(x.dtype)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    num_groups: int = 1,
) -> Prenorm:
    """LayerNorm or RMSNorm over the last axis of x + residual, in ``num_groups`` groups of channels."""
    summed = _sum(x, residual, residual_in_fp32)
    y = _normalised(summed.working, weight, bias, eps, is_rms_norm, num_groups).to(x.dtype)
    return (y, summed.residual) if prenorm else y


def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    num_groups: int = 1,
) -> Prenorm:
    """``layer_norm`` by groups; an op of its own in fla."""
    return layer_norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm, num_groups)


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Prenorm:
    """RMSNorm over the last axis of x + residual."""
    return layer_norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, True)


def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    num_groups: int = 1,
) -> Prenorm:
    """A norm and a linear map after it."""
    summed = _sum(x, residual, residual_in_fp32)
    y = _normalised(summed.working, norm_weight, norm_bias, eps, is_rms_norm, num_groups).to(x.dtype)
    out = F.linear(y, linear_weight.to(y.dtype), None if linear_bias is None else linear_bias.to(y.dtype))
    return (out, summed.residual) if prenorm else out


def _gated(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    prenorm: bool,
    residual_in_fp32: bool,
    eps: float,
    is_rms_norm: bool,
) -> Prenorm:
    summed = _sum(x, residual, residual_in_fp32)
    y = _normalised(summed.working, weight, bias, eps, is_rms_norm)
    gate = g.to(y.dtype)
    if activation in ("swish", "silu"):
        y = y * gate * gate.sigmoid()
    elif activation == "sigmoid":
        y = y * gate.sigmoid()
    y = y.to(x.dtype)
    return (y, summed.residual) if prenorm else y


def layer_norm_gated(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str = "swish",
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Prenorm:
    """LayerNorm(x + residual) times swish(g) or sigmoid(g)."""
    return _gated(x, g, weight, bias, activation, residual, prenorm, residual_in_fp32, eps, False)


def rms_norm_gated(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str = "swish",
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Prenorm:
    """RMSNorm(x + residual) times swish(g) or sigmoid(g)."""
    return _gated(x, g, weight, bias, activation, residual, prenorm, residual_in_fp32, eps, True)


def l2norm(x: Tensor, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> Tensor:
    """x / |x| over the last axis, eps inside the root."""
    working = x.to(working_dtype(x))
    return (working * torch.rsqrt(working.square().sum(-1, keepdim=True) + eps)).to(output_dtype or x.dtype)
