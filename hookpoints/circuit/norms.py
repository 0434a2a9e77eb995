"""Norms to autograd: with their scale held fixed, or with their scale apart, so that a change goes through exactly.

Both are function modes of torch, so that they need no code for a family: a norm is what takes a root of a mean square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_ROOTS = (torch.sqrt, Tensor.sqrt)
_INVERSE_ROOTS = (torch.rsqrt, Tensor.rsqrt)
_NORMS = (F.layer_norm, F.group_norm, F.rms_norm)
Arguments = tuple[object, ...]


class Normed(NamedTuple):
    """What a norm function of torch makes of its input, in parts."""

    square: Tensor
    """The mean square that it divides by the root of, its eps included."""
    direction: Tensor
    """The input, its mean taken off by LayerNorm and GroupNorm: [...,G,D/G] for G groups."""
    weight: Tensor | None
    bias: Tensor | None

    def scaled(self, scale: Tensor) -> Tensor:
        """The norm's output with ``scale`` [...,G,1] for one over the root."""
        value = (self.direction * scale).flatten(-2)
        value = value if self.weight is None else value * self.weight
        return value if self.bias is None else value + self.bias


def _norm_of(func: Callable[..., Tensor], args: Arguments, kwargs: Mapping[str, object]) -> Normed:
    """The parts of a call of one of ``_NORMS`` over the last axis."""
    names = ("input", "num_groups" if func is F.group_norm else "normalized_shape", "weight", "bias", "eps")
    if func is F.rms_norm:
        names = ("input", "normalized_shape", "weight", "eps")
    given = {**dict(zip(names, args)), **kwargs}
    x = given["input"]
    weight = given.get("weight")
    bias = given.get("bias")
    eps = given.get("eps")
    groups = given.get("num_groups", 1)
    assert isinstance(x, Tensor) and isinstance(groups, int)
    if eps is None:
        eps = torch.finfo(x.dtype).eps if func is F.rms_norm else 1e-5
    assert isinstance(eps, float)
    direction = x.unflatten(-1, (groups, -1))
    if func is not F.rms_norm:
        direction = direction - direction.mean(-1, keepdim=True)
    square = direction.square().mean(-1, keepdim=True) + eps
    weight = weight if isinstance(weight, Tensor) else None
    return Normed(square, direction, weight, bias if isinstance(bias, Tensor) else None)


class FrozenNorms(TorchFunctionMode):
    """While this is on, norms are to autograd what they are at a fixed scale: gain * (x - mean) / scale + bias. Values
    do not change."""

    def __torch_function__(
        self,
        func: Callable[..., Tensor],
        types: Iterable[type],
        args: Arguments = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> Tensor:
        value = func(*args, **(kwargs or {}))
        if func in _ROOTS or func in _INVERSE_ROOTS:
            return value.detach()
        if func is F.normalize and value.requires_grad:
            return _at_fixed_length(value, args[0])
        if func not in _NORMS or not value.requires_grad:
            return value
        norm = _norm_of(func, args, kwargs or {})
        linear = norm.scaled(norm.square.rsqrt().detach())
        return value.detach() + (linear - linear.detach())


def _at_fixed_length(value: Tensor, x: object) -> Tensor:
    """What ``F.normalize`` made of x [...,D] over its last axis, its length a constant."""
    assert isinstance(x, Tensor)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12).detach()
    return value.detach() + (x - x.detach()) / length


class Constants(FrozenNorms):
    """`FrozenNorms`, and patterns of softmax attention are constants: where an answer is saturated, gradients of norms
    and gates point the wrong way, and what the values carry is left."""

    def __torch_function__(
        self,
        func: Callable[..., Tensor],
        types: Iterable[type],
        args: Arguments = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> Tensor:
        if func is F.scaled_dot_product_attention:
            query, key, *rest = args
            assert isinstance(query, Tensor) and isinstance(key, Tensor)
            return func(query.detach(), key.detach(), *rest, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


_SECANTS = (F.silu, F.gelu, F.relu, torch.relu, Tensor.relu)
"""Activations that are their input times a gate."""
_GATES = (torch.sigmoid, Tensor.sigmoid, F.sigmoid, F.softplus, torch.tanh, Tensor.tanh, F.tanh, torch.exp, Tensor.exp)
"""What gates, decays and strengths are made with."""


class Affine(Constants):
    """`Constants`, activations are their input times a constant, and gates are constants: what a block makes of the
    residual stream is then linear in it but for biases, and parts of the stream add up."""

    def __torch_function__(
        self,
        func: Callable[..., Tensor],
        types: Iterable[type],
        args: Arguments = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> Tensor:
        value = super().__torch_function__(func, types, args, kwargs)
        if func in _GATES:
            return value.detach()
        if func not in _SECANTS or not value.requires_grad:
            return value
        x = args[0]
        assert isinstance(x, Tensor)
        flat = x.abs() < 1e-9
        gate = torch.where(flat, torch.full_like(x, 0.5), value / torch.where(flat, torch.ones_like(x), x)).detach()
        return value.detach() + gate * (x - x.detach())


def rounding(x: Tensor) -> float:
    """What a number in the dtype of ``x`` may miss after a few steps, as a share of it."""
    return max(1e-3, 8 * torch.finfo(x.dtype).eps)


class Form(NamedTuple):
    """A mean square as a function of reads: the sum of squares of their entries, each with its weight."""

    slope: Tensor
    """[1,T,H,V], its first derivatives by the entries."""
    curve: Tensor
    """[1,T,H,V], its second derivatives by the entries, or by these less their mean."""
    centered: bool
    """Whether the mean over V is taken off."""


class HeadNorm(NamedTuple):
    """One norm between a head's read and what the head hands on."""

    square: Tensor
    """The mean square that it takes a root of; differentiable by the reads."""
    level: Tensor
    """Ones: its scale is a constant times this."""

    @torch.enable_grad()
    def form(self, reads: Tensor) -> Form | None:
        """The mean square by ``reads`` [1,T,H,V]; None where it is none. A centered one has second derivatives 2 / V,
        which sum to 0."""
        (slope,) = torch.autograd.grad(self.square.sum(), reads, create_graph=True)
        (curve,) = torch.autograd.grad(slope.sum(), reads, retain_graph=True)
        n_values = reads.shape[-1]
        probe = torch.arange(n_values, device=reads.device).cos().to(reads)
        (bent,) = torch.autograd.grad((slope * probe).sum(), reads, retain_graph=True)
        small = rounding(reads) * bent.abs().max()
        centered = bool(curve.abs().max() < small)
        if centered:
            curve = torch.full_like(reads, 2 / n_values)
            probe = probe - probe.mean()
        fits = torch.allclose(bent, curve * probe, rtol=0, atol=float(small))
        return Form(slope.detach(), curve, centered) if fits else None


class ScalesApart(TorchFunctionMode):
    """In this scope each norm is linear in its input and in its scale, a constant times ``level``."""

    def __init__(self) -> None:
        super().__init__()
        self.norms: list[HeadNorm] = []
        """The norms so far."""

    def __torch_function__(
        self,
        func: Callable[..., Tensor],
        types: Iterable[type],
        args: Arguments = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> Tensor:
        value = func(*args, **(kwargs or {}))
        is_norm = func in _NORMS or func in _ROOTS or func in _INVERSE_ROOTS
        if not is_norm or not value.requires_grad:
            return value
        norm = _norm_of(func, args, kwargs or {}) if func in _NORMS else None
        square = args[0] if norm is None else norm.square
        assert isinstance(square, Tensor)
        level = torch.ones_like(square, requires_grad=True)
        self.norms.append(HeadNorm(square, level))
        if norm is not None:
            return norm.scaled(square.rsqrt().detach() * level)
        return value.detach() * level if func in _INVERSE_ROOTS else value.detach() / level
