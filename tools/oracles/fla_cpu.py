"""Models of flash-linear-attention on a CPU, for tests: its kernels in torch, and a stand-in for triton.

fla's modules define Triton kernels when they are imported, and its layers are plain PyTorch around those kernels.
Inside ``standing_in``, names of triton resolve to objects that can decorate, be subclassed and be passed around, and
that raise when a kernel is launched. Afterwards ``sys.modules`` is without them, so that PyTorch and transformers do
not come to believe that triton is there. Recurrent ops have no form here: hookpoints' own kernel steps in for them.

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
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _triton

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


# -- rotary embeddings and token shift


def rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    chunk_indices: object = None,
) -> Tensor:
    """Rotate the first R channels of x by the angle of its position.

    Args:
        x: [B,T,H,D], or [1, sum T, H, D] with ``cu_seqlens``.
        cos, sin: [positions, R/2].
        seqlen_offsets: position of the first token, one for all or one per sequence [N]. Tokens whose position is
            not in the table (padding before a sequence) stay as they are.
    """
    where = _positions(x, seqlen_offsets, cu_seqlens)  # [B,T]
    known = ((where >= 0) & (where < len(cos)))[..., None, None]
    where, dtype = where.clamp(0, len(cos) - 1), working_dtype(x)
    c, s = (table[where].unsqueeze(2).to(dtype) for table in (cos, sin))  # [B,T,1,R/2]
    turned, rest = x.tensor_split([2 * c.shape[-1]], -1)
    turned = turned.to(dtype)
    first, second = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    pair = (first * c - second * s, first * s + second * c)
    rotated = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    y = torch.where(known, torch.cat([rotated.to(x.dtype), rest], -1), x)
    return x.copy_(y) if inplace else y


def _positions(x: Tensor, offsets: int | Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[B,T] position of each token in its sequence."""
    if cu_seqlens is None:
        own = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        return own + (offsets[:, None] if isinstance(offsets, Tensor) else offsets)
    spans = list(sequences(cu_seqlens))
    starts = offsets.tolist() if isinstance(offsets, Tensor) else [offsets] * len(spans)
    return torch.cat(
        [torch.arange(span.stop - span.start, device=x.device) + s for span, s in zip(spans, starts, strict=True)]
    )[None]


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


# -- flash_attn's two functions, for the softmax layers of fla's hybrids


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    **_: object,
) -> Tensor:
    """Attention of q [B,T,H,D] over k, v [B,S,Hk,D]; the last query stands at the last key. Returns [B,T,H,D]."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2) if groups > 1 else x for x in (k, v))
    allowed = _allowed(q.shape[1], k.shape[1], causal, window_size, q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout_p, scale=softmax_scale)
    return out.transpose(1, 2)


def _allowed(queries: int, keys: int, causal: bool, window: Window, device: torch.device) -> Tensor:
    """[T,S], True where a query may look."""
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)
    left, right = window[0], 0 if causal else window[1]
    allowed = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if left >= 0:
        allowed &= key >= query - left
    return allowed & (key <= query + right) if right >= 0 else allowed


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any
) -> Tensor:
    """``flash_attn_func`` for packed sequences: q [sum T, H, D], k and v [sum S, Hk, D]."""
    for name in ("max_seqlen_q", "max_seqlen_k"):
        options.pop(name, None)
    spans = zip(sequences(cu_seqlens_q), sequences(cu_seqlens_k), strict=True)
    parts = [flash_attn_func(q[a][None], k[b][None], v[b][None], **options)[0] for a, b in spans]
    return torch.cat(parts)


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
    "fla.modules.rotary.ops": {"rotary_embedding": rotary_embedding},
    "fla.modules.token_shift": {"token_shift": token_shift},
    "fla.ops.rwkv7.fused_addcmul": {"fused_addcmul_rwkv7": addcmul},
    "fla.ops.rwkv7.fused_k_update": {"fused_k_rwkv7": key},
    "fla.ops.rwkv7.gate_output_correction": {"gate_output_correction": gated_bonus},
    "fla.layers.attn": {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func},
}
"""Module -> function -> substitute."""


# -- a stand-in for triton

VERSION = "3.3.0"
"""The oldest triton that fla accepts; it only ever compares the number."""


class _Symbol:
    """Stands for whatever triton might export: it can decorate, be subclassed and be passed around. What it decorates
    stands for a compiled kernel, which has a name and cannot be launched."""

    def __init__(self, name: str = "", *_args: object, fn: object = None, **_kwargs: object):
        self._name, self.fn, self.arg_names = name, fn, ()
        self.__name__ = getattr(fn, "__name__", str(name).rsplit(".", 1)[-1])

    def __call__(self, *args: object, **kwargs: object) -> _Symbol:
        """As a decorator (``jit``, or what ``autotune(...)`` returned) gives a kernel; else another symbol."""
        if len(args) == 1 and not kwargs and (isinstance(args[0], _Symbol) or hasattr(args[0], "__code__")):
            return args[0] if isinstance(args[0], _Symbol) else _Symbol("triton.kernel", fn=args[0])
        return _Symbol(self._name)

    def _launch(self, *_args: object, **_kwargs: object) -> NoReturn:
        raise RuntimeError(f"the Triton kernel {self.__name__} was launched, but triton is not installed")

    __getitem__ = run = warmup = _launch

    def __getattr__(self, name: str) -> _Symbol:
        return _child(self._name, name)

    def __mro_entries__(self, _bases: tuple[object, ...]) -> tuple[type, ...]:
        return (_Symbol,)


def _child(parent: str, name: str) -> _Symbol:
    if name.startswith("__"):
        raise AttributeError(name)
    if name == "active":  # triton.runtime.driver.active: as triton itself does where it finds no GPU
        raise RuntimeError("0 active drivers: triton is not installed")
    return _Symbol(f"{parent}.{name}")


class _Module(ModuleType):
    """A stand-in module; a package, so that its submodules can be imported."""

    __path__: MutableSequence[str] = []  # noqa: RUF012
    __version__ = VERSION

    def __getattr__(self, name: str) -> object:
        if self.__name__ == "triton" and name in _ARITHMETIC:
            return _ARITHMETIC[name]
        return _child(self.__name__, name)


_ARITHMETIC: dict[str, Callable[..., int]] = {
    "cdiv": lambda x, y: -(-x // y),
    "next_power_of_2": lambda n: 1 << (n - 1).bit_length(),
}
"""Triton's helpers for the sizes of a launch: with them, what fails is the launch, which says why."""


class _Finder(MetaPathFinder, Loader):
    """Finds triton and everything below it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if _is_triton(fullname) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def _is_triton(name: str) -> bool:
    return name == "triton" or name.startswith("triton.")


@contextmanager
def standing_in() -> Iterator[None]:
    """Let ``import triton`` give the stand-in until the context is left."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if _is_triton(name)]:
            del sys.modules[name]


# -- importing


def import_fla() -> ModuleType:
    """fla as ``hookpoints.fla.import_fla`` gives it. Without triton: its models run on a CPU."""
    if importlib.util.find_spec("triton") is None and "fla.models" not in sys.modules:
        # PyTorch finds out now, and remembers, that there is no triton: it would otherwise ask during the import.
        _triton.has_triton_package()
        importlib.import_module("torch._inductor.runtime.triton_compat")
        torch.compile(torch.nn.Identity())
        for name in [name for name in sys.modules if name == "fla" or name.startswith("fla.")]:
            del sys.modules[name]  # imported without triton it is empty
        with standing_in(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Triton is not supported on current platform")
            importlib.import_module("fla")
        for name, ops in _TAKEN_BY_TRANSFORMERS.items():
            for op in ops if name in sys.modules else ():
                vars(sys.modules[name]).pop(op, None)
        _substitute()
    return own.import_fla()


_TAKEN_BY_TRANSFORMERS = {
    "fla.ops.gated_delta_rule": ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"),
    "fla.ops.kda": ("chunk_kda", "fused_recurrent_kda"),
}
"""Ops that transformers binds in place of its own wherever they can be imported."""


def _substitute() -> None:
    """Bind fla's names to their substitutes, wherever a module of fla refers to them."""
    wrapped = {}
    for module_name, functions in SUBSTITUTES.items():
        module = importlib.import_module(module_name)
        for name, substitute in functions.items():
            original = getattr(module, name, None)
            if original is None:  # of another package, which is not installed
                setattr(module, name, substitute)
            else:
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
