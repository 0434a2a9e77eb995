"""RWKV-7 (Peng et al. 2025, arXiv 2503.14456, eq. 17): this package's own model and fla's layers.

    S_t = (diag(alpha_t) + b_t a_t^T) S_{t-1} + k_t v_t^T,    o_t = S_t^T r_t

with one decay per key channel and an erase of its own: it reads back with a = -kappa, the normalised erase key, and
takes off along b = kappa * rate. What is written has the key k, which is another vector, scaled by the in-context rate
already; so there is no beta, and editing k leaves the erase alone.

Two forms of call: with a and b (``rwkv7_recurrence``, ``chunk_rwkv7``, ``fused_recurrent_rwkv7``), or with kappa as
``kk`` and the rate as ``a`` (``fused_mul_recurrent_rwkv7``). States are key-first in all of them. What a layer adds to
the read, the bonus (r . r_k k) v, and its gate are outside the op.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn

from hookpoints.recurrence.recurrence import Recurrence
from hookpoints.rules.base import Factors, OpResult, compute_dtype

_NAMES = {"q": "r", "k": "k", "v": "v", "log_decay": "w"}


class RWKV7:
    """The rule of ``hookpoints.rwkv7.rwkv7_recurrence``."""

    name = "RWKV-7"
    ops: tuple[str, ...] = ("rwkv7_recurrence",)
    companions: tuple[str, ...] = ()
    fused: tuple[str, ...] = ()
    torch_only: frozenset[str] = frozenset()
    rank = 1
    factor_names = ("q", "k", "v", "log_decay")

    def head_shape(self, mixer: nn.Module) -> tuple[int, int, int]:
        return mixer.num_heads, mixer.head_dim, mixer.head_v_dim  # type: ignore[return-value]

    def for_mixer(self, mixer: nn.Module) -> RWKV7:
        return self

    def runs(self, op: Callable[..., Any], arguments: Mapping[str, Any]) -> bool:
        return True

    def factors(self, arguments: Mapping[str, Any]) -> Factors:
        dtype, state = compute_dtype(arguments["v"]), arguments["initial_state"]
        return Factors(
            **{field: arguments[name].to(dtype) for field, name in _NAMES.items()},
            initial_state=None if state is None else state.to(dtype),
        )

    def arguments(self, arguments: Mapping[str, Any], factors: Factors, changed: Set[str]) -> dict[str, Any]:
        return {**arguments, **{_NAMES[field]: getattr(factors, field) for field in changed}}

    def recurrence(self, factors: Factors, arguments: Mapping[str, Any]) -> Recurrence:
        scale, (along, back) = arguments["scale"], _erase(arguments)
        return Recurrence(
            q=factors.q,
            k=factors.k,
            u=factors.v,
            log_decay=factors.log_decay,
            a=along.to(factors.k.dtype),
            b=back.to(factors.k.dtype),
            scale=factors.k.shape[-1] ** -0.5 if scale is None else scale,
            initial_state=factors.initial_state,
        )

    def output_dtype(self, arguments: Mapping[str, Any]) -> torch.dtype:
        return arguments["v"].dtype

    def wants_state(self, arguments: Mapping[str, Any]) -> bool:
        return bool(arguments["output_final_state"])

    def read_result(self, native: Any, arguments: Mapping[str, Any]) -> OpResult:
        return OpResult(*native)

    def write_result(self, result: OpResult, arguments: Mapping[str, Any]) -> Any:
        return tuple(result)


class FlaRWKV7(RWKV7):
    """The rule of fla's ops, which are Triton kernels and run on a GPU only."""

    ops = ("chunk_rwkv7", "fused_mul_recurrent_rwkv7", "fused_recurrent_rwkv7")

    def runs(self, op: Callable[..., Any], arguments: Mapping[str, Any]) -> bool:
        return arguments["v"].device.type != "cpu"

    def arguments(self, arguments: Mapping[str, Any], factors: Factors, changed: Set[str]) -> dict[str, Any]:
        fed = super().arguments(arguments, factors, changed)
        # The kernels take r, k and v in one dtype.
        return {**fed, **{name: fed[name].to(arguments[name].dtype) for name in _NAMES.values()}}


def _erase(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Where the erase acts, and what it reads back with, [B,T,H,K] each: ``a`` and ``b`` of the canonical form, which
    fla calls the other way round."""
    if "kk" in arguments:
        return arguments["kk"] * arguments["a"], -arguments["kk"]
    return arguments["b"], arguments["a"]
