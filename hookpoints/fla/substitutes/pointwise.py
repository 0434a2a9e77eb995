"""What fla's kernels do to each token by itself, in plain torch: norms, activations, and RWKV-7's mixes and gates.

As the kernels do, the work is done in float32 (float64 stays) and results are rounded once, to the input's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Prenorm = Tensor | tuple[Tensor, Tensor]
"""The normalised tensor, or with ``prenorm`` also the sum that was normalised: the residual stream."""


def working_dtype(x: Tensor) -> torch.dtype:
    """What a kernel computes in: float32, here float64 where the input is."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# -- norms: LayerNorm, RMSNorm, GroupNorm, with a residual, a gate or a projection fused in


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


# -- activations


def _rounded(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``function`` in the working dtype, its result in the first input's."""
    dtype = working_dtype(inputs[0])
    return function(*(x.to(dtype) for x in inputs)).to(inputs[0].dtype)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x))."""
    return _rounded(torch.sigmoid, x)


def logsigmoid(x: Tensor, temperature: float = 1.0) -> Tensor:
    """log sigmoid(x) / temperature."""
    return _rounded(lambda x: F.logsigmoid(x) / temperature, x)


def swish(x: Tensor) -> Tensor:
    """x sigmoid(x)."""
    return _rounded(F.silu, x)


def elu_p1(x: Tensor) -> Tensor:
    """elu(x) + 1, a positive feature map."""
    return _rounded(lambda x: F.elu(x) + 1, x)


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2."""
    return _rounded(lambda x: F.relu(x).square(), x)


def gelu(x: Tensor) -> Tensor:
    """GELU with the tanh approximation, in the input's dtype."""
    return F.gelu(x, approximate="tanh")


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU of x + bias."""
    return F.gelu(x + bias, approximate="tanh").to(x.dtype)


def swiglu(x: Tensor, y: Tensor) -> Tensor:
    """swish(x) y."""
    return _rounded(lambda x, y: F.silu(x) * y, x, y)


def sigmoidglu(x: Tensor, y: Tensor) -> Tensor:
    """sigmoid(x) y."""
    return _rounded(lambda x, y: x.sigmoid() * y, x, y)


def powglu(x: Tensor, y: Tensor, power: float = 3.0) -> Tensor:
    """x^(power / (sqrt(x) + 1)) sigmoid(x) y for x > 0, else x sigmoid(x) y."""

    def function(x: Tensor, y: Tensor) -> Tensor:
        positive = torch.where(x > 0, x, torch.ones_like(x))
        raised = positive.pow(power / (positive.sqrt() + 1))
        return torch.where(x > 0, raised, x) * x.sigmoid() * y

    return _rounded(function, x, y)


def swiglu_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """swiglu, then a linear map."""
    return F.linear(swiglu(x, y), weight, bias)


def sigmoidglu_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """sigmoidglu, then a linear map."""
    return F.linear(sigmoidglu(x, y), weight, bias)


def powglu_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, power: float = 3.0) -> Tensor:
    """powglu, then a linear map."""
    return F.linear(powglu(x, y, power), weight, bias)


# -- what RWKV-7 layers compute around the recurrence


def addcmul(
    hidden_states: Tensor,
    delta: Tensor,
    xr: Tensor,
    xw: Tensor,
    xk: Tensor,
    xv: Tensor,
    xa: Tensor,
    xg: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """x + delta * mix for each mix [1,1,D]; None where there is no ``xg``. x and delta [B,T,D]."""
    mixes = (xr, xw, xk, xv, xa, xg)
    return tuple(None if mix is None else hidden_states.addcmul(delta, mix) for mix in mixes)


def key(k: Tensor, a: Tensor, ka: Tensor, cu_seqlens: object = None, cu_seqlens_cpu: object = None) -> Tensor:
    """k (1 + (a - 1) ka), all [B,T,D] but ka [D]."""
    return k.addcmul(k * (a - 1), ka)


def gated_bonus(o: Tensor, r: Tensor, k: Tensor, r_k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """(o + (r . r_k k) v) g with o and g [B,T,H*V], r and k [B,T,H,K], r_k [H,K], v [B,T,H,V]."""
    bonus = (r * k * r_k).sum(-1, keepdim=True) * v
    return (o + bonus.reshape(o.shape)) * g
