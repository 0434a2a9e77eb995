"""fla's fused activations in plain torch, with the kernels' rounding: float32 inside, the input's dtype outside."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from hookpoints.fla.substitutes.numbers import working_dtype


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
