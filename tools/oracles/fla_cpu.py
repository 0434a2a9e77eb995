"""Models of flash-linear-attention on a CPU, for tests: torch in place of the kernels around its recurrent ops.

fla's layers are plain PyTorch around Triton kernels, which need a GPU. Recurrent ops have no form here: hookpoints' own
kernel steps in for them.

A substitute takes the same arguments as the function it stands in for and returns the same. As the kernels do, the
work is done in float32 (float64 stays) and results are rounded once, to the input's dtype. What runs along the sequence
takes packed sequences, too: [1, sum T, ...] with the bounds ``cu_seqlens`` [N+1]. ``test_fla_kernels.py`` compares
models that run on them with fla's own kernels.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from hookpoints import fla as own

Window = tuple[int, int]
"""How many tokens before and after a query it may look at; -1 for all."""
Prenorm = Tensor | tuple[Tensor, Tensor]
"""The normalised tensor, or with ``prenorm`` also the sum that was normalised: the residual stream."""


def working_dtype(x: Tensor) -> torch.dtype:
    """What a kernel computes in: float32, here float64 where the input is."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# -- norms: LayerNorm, RMSNorm, GroupNorm, with a residual, a gate or a projection fused in


def _sum(x: Tensor, residual: Tensor | None, residual_in_fp32: bool) -> tuple[Tensor, Tensor]:
    """x + residual in the working dtype, and the same as it goes on."""
    working = x.to(working_dtype(x))
    if residual is None:
        return working, (x.float() if residual_in_fp32 and x.dtype != torch.float64 else x)
    working = working + residual.to(working.dtype)
    return working, working.to(residual.dtype)


def _normalised(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, is_rms_norm: bool, num_groups: int = 1
) -> Tensor:
    weight, bias = (None if each is None else each.to(x.dtype) for each in (weight, bias))
    if is_rms_norm and num_groups == 1:
        y = F.rms_norm(x, x.shape[-1:], weight, eps)
        return y if bias is None else y + bias
    if not is_rms_norm:
        return F.group_norm(x.flatten(0, -2), num_groups, weight, bias, eps).view_as(x)
    y = F.rms_norm(x.unflatten(-1, (num_groups, -1)), (x.shape[-1] // num_groups,), eps=eps).flatten(-2)
    if weight is not None:
        y = y * weight
    return y if bias is None else y + bias


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
    """LayerNorm or RMSNorm over the last axis of x + residual, in ``num_groups`` groups of channels; also fla's
    ``group_norm``."""
    working, onward = _sum(x, residual, residual_in_fp32)
    y = _normalised(working, weight, bias, eps, is_rms_norm, num_groups).to(x.dtype)
    return (y, onward) if prenorm else y


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
    y, onward = layer_norm(x, norm_weight, norm_bias, residual, eps, True, residual_in_fp32, is_rms_norm, num_groups)
    out = F.linear(y, linear_weight.to(y.dtype), None if linear_bias is None else linear_bias.to(y.dtype))
    return (out, onward) if prenorm else out


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
    """RMSNorm of x + residual, times swish(g) or sigmoid(g)."""
    working, onward = _sum(x, residual, residual_in_fp32)
    gate = g.to(working.dtype)
    gates = {"swish": gate * gate.sigmoid(), "silu": gate * gate.sigmoid(), "sigmoid": gate.sigmoid()}
    y = (_normalised(working, weight, bias, eps, True) * gates[activation]).to(x.dtype)
    return (y, onward) if prenorm else y


def l2norm(x: Tensor, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> Tensor:
    """x / |x| over the last axis, eps inside the root."""
    working = x.to(working_dtype(x))
    return (working * torch.rsqrt(working.square().sum(-1, keepdim=True) + eps)).to(output_dtype or x.dtype)


# -- activations


def _rounded(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``function`` in the working dtype, its result in the first input's."""
    dtype = working_dtype(inputs[0])
    return function(*(x.to(dtype) for x in inputs)).to(inputs[0].dtype)


def swiglu(x: Tensor, y: Tensor) -> Tensor:
    """swish(x) y."""
    return _rounded(lambda x, y: F.silu(x) * y, x, y)


def swiglu_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """swish(x) y, then a linear map."""
    return F.linear(swiglu(x, y), weight, bias)


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
    return tuple(mix if mix is None else hidden_states.addcmul(delta, mix) for mix in (xr, xw, xk, xv, xa, xg))


def key(k: Tensor, a: Tensor, ka: Tensor, cu_seqlens: object = None, cu_seqlens_cpu: object = None) -> Tensor:
    """k (1 + (a - 1) ka), all [B,T,D] but ka [D]."""
    return k.addcmul(k * (a - 1), ka)


def gated_bonus(o: Tensor, r: Tensor, k: Tensor, r_k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """(o + (r . r_k k) v) g with o and g [B,T,H*V], r and k [B,T,H,K], r_k [H,K], v [B,T,H,V]."""
    bonus = (r * k * r_k).sum(-1, keepdim=True) * v
    return (o + bonus.reshape(o.shape)) * g


# -- along the sequence


def sequences(cu_seqlens: Tensor) -> Iterator[slice]:
    """Where each sequence lies on the time axis of a packed batch [1, sum T, ...]."""
    bounds = cu_seqlens.tolist()
    return (slice(start, stop) for start, stop in itertools.pairwise(bounds))


# -- short causal convolutions; a cache [N,D,W] holds the last W inputs of each sequence, oldest first


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool | None = False,
    activation: str | None = None,
    backend: str | None = None,
    cu_seqlens: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, Tensor | None]:
    """y_t = act(sum_w weight[:, w] x_{t-W+1+w} + bias) + residual_t, inputs before a sequence zero or from its cache.

    Args:
        x: [B,T,D], or [1, sum T, D] with ``cu_seqlens`` [N+1].
        weight: [D,W].
        initial_state: [N,D,W].

    Returns: y like x, and the cache [N,D,W] if asked for.
    """
    parts = [x] if cu_seqlens is None else [x[:, span] for span in sequences(cu_seqlens)]
    states = [initial_state] if cu_seqlens is None or initial_state is None else initial_state.split(1)
    done = [_convolve(part, weight, bias, activation, state) for part, state in _zip(parts, states)]
    y = torch.cat([y for y, _ in done], 1)
    if residual is not None:
        y = y + residual.to(y.dtype)
    final = torch.cat([state for _, state in done]).to(x.dtype) if output_final_state else None
    return y.to(x.dtype), final


def _zip(parts: list[Tensor], states: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor | None]]:
    return list(zip(parts, [*states, *[None] * (len(parts) - len(states))], strict=True))


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y [N,T,D] and the cache [N,D,W] of one stretch, both in the working dtype."""
    dtype, width = working_dtype(x), weight.shape[1]
    inputs = x.to(dtype).mT  # [N,D,T]
    before = inputs.new_zeros(*inputs.shape[:2], width) if state is None else state.to(dtype)
    inputs = torch.cat([before, inputs], -1)
    offset = None if bias is None else bias.to(dtype)
    y = F.conv1d(inputs[..., 1:], weight.to(dtype).unsqueeze(1), offset, groups=weight.shape[0]).mT
    return (F.silu(y) if activation in ("silu", "swish") else y), inputs[..., -width:]


def causal_conv1d_update(
    x: Tensor,
    cache: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One token per sequence: x [N,D], [1,N,D] or [N,1,D]. ``cache`` [N,D,W] is moved on in place, as fla does."""
    assert weight is not None, "fla's layers always give the convolution a weight"
    tokens = x.reshape(-1, 1, weight.shape[0])
    y, moved = _convolve(tokens, weight, bias, activation, cache)
    cache.copy_(moved)
    y = y.reshape(x.shape)
    return (y if residual is None else y + residual.reshape(x.shape).to(y.dtype)).to(x.dtype), cache


# -- token shift


def token_shift(
    x: Tensor,
    cu_seqlens: Tensor | None = None,
    cache: Tensor | None = None,
    output_cache: bool = False,
    chunk_indices: object = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """x_{t-1} - x_t; before a sequence stands its cache, or zero.

    Args:
        x: [B,T,D], or [1, sum T, D] with ``cu_seqlens``.
        cache: [N,D] (or [N,1,D]) last token of the stretch before.

    Returns: like x; with ``output_cache`` also the last token [N,D] of each sequence.
    """
    spans = [slice(0, x.shape[1])] if cu_seqlens is None else list(sequences(cu_seqlens))
    count = x.shape[0] if cu_seqlens is None else len(spans)
    before = x.new_zeros(count, x.shape[-1]) if cache is None else cache.reshape(count, -1).to(x.dtype)
    rows = [before] if cu_seqlens is None else before.split(1)
    shifted = [torch.cat([row.unsqueeze(1), x[:, span][:, :-1]], 1) for row, span in zip(rows, spans, strict=True)]
    out = torch.cat(shifted, 1) - x
    return (out, torch.cat([x[:, span.stop - 1] for span in spans])) if output_cache else out


SUBSTITUTES: Mapping[str, Mapping[str, Callable[..., object]]] = {
    "fla.modules.norm.layernorm": {
        "layer_norm": layer_norm,
        "group_norm": layer_norm,
        "rms_norm": rms_norm,
        "layer_norm_linear": layer_norm_linear,
    },
    "fla.modules.norm.fused_norm_gate": {"rms_norm_gated": rms_norm_gated},
    "fla.modules.norm.l2norm": {"l2norm": l2norm},
    "fla.modules.activations.ops": {
        "swish": lambda x: _rounded(F.silu, x),
        "sqrelu": lambda x: _rounded(lambda x: F.relu(x).square(), x),
        "swiglu": swiglu,
        "swiglu_linear": swiglu_linear,
    },
    "fla.modules.causal_conv1d.ops": {"causal_conv1d": causal_conv1d, "causal_conv1d_update": causal_conv1d_update},
    "fla.modules.token_shift": {"token_shift": token_shift},
    "fla.ops.rwkv7.fused_addcmul": {"fused_addcmul_rwkv7": addcmul},
    "fla.ops.rwkv7.fused_k_update": {"fused_k_rwkv7": key},
    "fla.ops.rwkv7.gate_output_correction": {"gate_output_correction": gated_bonus},
}
"""Module -> function -> substitute."""


# -- importing


@functools.cache
def import_fla() -> ModuleType:
    """fla as ``hookpoints.fla.import_fla`` gives it, whose models run on a CPU without launching a kernel."""
    fla = own.import_fla()
    _substitute()
    return fla


def _substitute() -> None:
    """Bind fla's names to their substitutes, wherever a module of fla refers to them."""
    wrapped = {}
    for module_name, functions in SUBSTITUTES.items():
        module = importlib.import_module(module_name)
        for name, substitute in functions.items():
            original = getattr(module, name)
            wrapped[id(original)] = _standing_for(original, substitute)
    for name, module in list(sys.modules.items()):
        if name.startswith("fla."):
            for names in (vars(module), vars(module).get("ACT2FN", {})):
                names.update({n: wrapped[id(x)] for n, x in names.items() if id(x) in wrapped})


def _standing_for(original: Callable[..., object], substitute: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(original)
    def call(*args: object, **kwargs: object) -> object:
        return substitute(*args, **kwargs)

    return call
