"""What fla's ops share: heads last but one, states in one of two layouts, gates and norms computed inside the kernel.

fla's ops are Triton kernels and have no torch form, so they run on a GPU only; elsewhere hookpoints' own kernel
computes the pass. Their arguments are [B,T,H,K] and [B,T,H,V]. States are value-first where the call says so
(``state_v_first``), else key-first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn

from hookpoints.rules.base import Factors, OpResult


class FlaRule:
    """Base of the rules of fla's ops; a rule adds its names, ``head_shape``, ``factors`` and ``recurrence``."""

    companions: tuple[str, ...] = ()
    fused: tuple[str, ...] = ()
    torch_only: frozenset[str] = frozenset()
    rank: int = 1

    def head_shape(self, mixer: nn.Module) -> tuple[int, int, int]:
        heads: Any = getattr(mixer, "num_v_heads", None) or mixer.num_heads
        return heads, mixer.head_k_dim, mixer.head_v_dim  # type: ignore[return-value]

    def for_mixer(self, mixer: nn.Module) -> Any:
        return self

    def runs(self, op: Callable[..., Any], arguments: Mapping[str, Any]) -> bool:
        """Whether fla's kernel can compute this call."""
        return arguments["v"].device.type != "cpu"

    def fed(self, arguments: Mapping[str, Any], factors: Factors, changed: Set[str]) -> dict[str, Any]:
        """Arguments that hand ``changed`` factors to the op, with what it would have done to them turned off."""
        raise NotImplementedError

    def arguments(self, arguments: Mapping[str, Any], factors: Factors, changed: Set[str]) -> dict[str, Any]:
        fed = self.fed(arguments, factors, changed) if changed else {}
        dtype = arguments["v"].dtype  # the kernels take q, k and v in one dtype
        return {**arguments, **{name: x.to(dtype) if name in ("q", "k", "v") else x for name, x in fed.items()}}

    def output_dtype(self, arguments: Mapping[str, Any]) -> torch.dtype:
        return arguments["v"].dtype

    def wants_state(self, arguments: Mapping[str, Any]) -> bool:
        return bool(arguments["output_final_state"])

    def read_result(self, native: Any, arguments: Mapping[str, Any]) -> OpResult:
        outputs, state = native
        return OpResult(outputs, key_first(state, arguments))

    def write_result(self, result: OpResult, arguments: Mapping[str, Any]) -> Any:
        # The same transposition leads back.
        return result.outputs, key_first(result.final_state, arguments)


def key_first(state: Tensor | None, arguments: Mapping[str, Any]) -> Tensor | None:
    """[B,H,K,V] from a state in the layout of a call; its own inverse."""
    if state is None or not arguments.get("state_v_first"):
        return state
    return state.mT.contiguous()


def initial_state(arguments: Mapping[str, Any], dtype: torch.dtype) -> Tensor | None:
    """[B,H,K,V] state that a call begins with, or None for zeros."""
    state = key_first(arguments.get("initial_state"), arguments)
    return None if state is None else state.to(dtype)


def scale_of(arguments: Mapping[str, Any]) -> float:
    """Factor on q at the read: K^-1/2 unless the call says otherwise."""
    scale = arguments.get("scale")
    return float(arguments["k"].shape[-1] ** -0.5 if scale is None else scale)
