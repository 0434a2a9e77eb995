"""What a pass is to autograd: weights are constants, and if asked so are scales of norms and patterns.

All this is one function mode of torch, so that it needs no code for a family: a norm is what takes a root of a mean
square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hookpoints.scopes import scoped

_ROOTS = (torch.sqrt, Tensor.sqrt, torch.rsqrt, Tensor.rsqrt)
Arguments = tuple[object, ...]


def _centered_norm(
    input: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """As ``F.group_norm`` is called, over the last axis; the scale is a constant."""
    x = input.unflatten(-1, (groups, -1))
    value = _at_fixed_scale(x - x.mean(-1, keepdim=True), eps, weight)
    return value if bias is None else value + bias


def _layer_norm(input: Tensor, shape: object, *rest: Any, **named: Any) -> Tensor:
    """As ``F.layer_norm`` is called: a norm of one group."""
    return _centered_norm(input, 1, *rest, **named)


def _root_norm(input: Tensor, shape: object, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """As ``F.rms_norm`` is called, over the last axis; the scale is a constant."""
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _at_fixed_scale(input.unflatten(-1, (1, -1)), eps, weight)


def _at_fixed_scale(x: Tensor, eps: float, weight: Tensor | None) -> Tensor:
    """[...,G,D/G] of G groups over the root of their mean square, [...,D]."""
    scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt().detach()
    value = (x * scale).flatten(-2)
    return value if weight is None else value * weight


_NORMS: dict[object, Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    F.group_norm: _centered_norm,
    F.rms_norm: _root_norm,
}


# ------------------------------------------------------------------------------------------------ as constants


def _at_fixed_length(value: Tensor, x: Tensor) -> Tensor:
    """What ``F.normalize`` made of x [...,D] over its last axis, its length a constant."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12).detach()
    return value.detach() + (x - x.detach()) / length


def _as_constant(x: object) -> object:
    """A weight that is trained, as a constant, also in a list or tuple; anything else as it is."""
    if isinstance(x, list | tuple) and type(x) in (list, tuple):
        return type(x)(map(_as_constant, x))
    return x.detach() if isinstance(x, nn.Parameter) and x.requires_grad else x


class Constants(TorchFunctionMode):
    """While this is on, weights are constants to autograd, and with ``frozen`` scales of norms and patterns of softmax
    attention are as well: where an answer is saturated, their gradients point the wrong way. Values do not change. It
    is in force in its own thread alone, and leaves the weights as they are."""

    def __init__(self, frozen: bool):
        super().__init__()
        self.frozen = frozen

    def __torch_function__(
        self,
        func: Callable[..., Tensor],
        types: Iterable[type],
        args: Arguments = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> Tensor:
        args = tuple(_as_constant(x) for x in args)
        kwargs = {name: _as_constant(x) for name, x in (kwargs or {}).items()}
        if self.frozen and func is F.scaled_dot_product_attention:
            args = (*(cast(Tensor, x).detach() for x in args[:2]), *args[2:])
        value = func(*args, **kwargs)
        if not self.frozen or not isinstance(value, Tensor) or not value.requires_grad:
            return value
        if func in _ROOTS:
            return value.detach()
        if func in _NORMS:
            linear = _NORMS[func](*args, **kwargs)
            return value.detach() + (linear - linear.detach())
        if func is F.normalize:
            return _at_fixed_length(value, cast(Tensor, args[0]))
        return value


@scoped
def constants(frozen: bool) -> Iterator[Constants]:
    """In this scope weights take no gradients, so that a pass keeps no activations for these; ``frozen`` as of
    `Constants`."""
    mode = Constants(frozen)
    try:
        torch._C._push_on_torch_function_stack(mode)  # torch's own `with` is left on the stack by some interrupts
        yield mode
    finally:
        torch._C._pop_torch_function_stack()
