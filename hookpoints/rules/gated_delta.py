"""Gated DeltaNet (Yang et al., arXiv 2412.06464): Qwen3.5, Qwen3-Next, OLMo-hybrid.

    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,    o_t = S_t^T (K^-1/2 q_t)

with q, k l2-normalised (eps 1e-6 inside the root) and alpha one scalar per head and token. Beta lies in (0, 1),
or in (0, 2) where the model allows negative eigenvalues (OLMo-hybrid).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any

import torch
from torch import nn

from hookpoints.recurrence.recurrence import Recurrence
from hookpoints.rules.base import Factors, OpResult, compute_dtype, expand_groups, l2_normalise

_OTHERS = {"v": "value", "beta": "beta", "log_decay": "g"}


class GatedDelta:
    """The rule of transformers' ``torch_chunk_gated_delta_rule`` and ``torch_recurrent_gated_delta_rule``."""

    name = "Gated DeltaNet"
    ops = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
    companions = ("causal_conv1d_fn", "causal_conv1d_update")
    fused: tuple[str, ...] = ()
    torch_only: frozenset[str] = frozenset()
    rank = 1
    factor_names = ("q", "k", "v", "beta", "log_decay")

    def head_shape(self, mixer: nn.Module) -> tuple[int, int, int]:
        return mixer.num_v_heads, mixer.head_k_dim, mixer.head_v_dim  # type: ignore[return-value]

    def for_mixer(self, mixer: nn.Module) -> GatedDelta:
        return self

    def runs(self, op: Callable[..., Any], arguments: Mapping[str, Any]) -> bool:
        return True

    def factors(self, arguments: Mapping[str, Any]) -> Factors:
        v = arguments["value"]
        heads, dtype = v.shape[2], compute_dtype(v)
        q, k = (arguments[name].to(dtype) for name in ("query", "key"))
        if arguments["use_qk_l2norm_in_kernel"]:
            q, k = l2_normalise(q), l2_normalise(k)
        state = arguments["initial_state"]
        return Factors(
            q=expand_groups(q, heads),
            k=expand_groups(k, heads),
            v=v.to(dtype),
            beta=arguments["beta"].to(dtype),
            log_decay=arguments["g"].to(dtype),
            initial_state=None if state is None else state.to(dtype),
        )

    def arguments(self, arguments: Mapping[str, Any], factors: Factors, changed: Set[str]) -> dict[str, Any]:
        fed: dict[str, Any] = {}
        if changed & {"q", "k"}:  # one flag normalises both inside the op
            fed = {"query": factors.q, "key": factors.k, "use_qk_l2norm_in_kernel": False}
        fed |= {name: getattr(factors, field) for field, name in _OTHERS.items() if field in changed}
        return {**arguments, **fed}

    def recurrence(self, factors: Factors, arguments: Mapping[str, Any]) -> Recurrence:
        assert factors.beta is not None and factors.log_decay is not None
        k, beta, alpha = factors.k, factors.beta, factors.log_decay.exp()
        return Recurrence(
            q=factors.q,
            k=k,
            u=beta.unsqueeze(-1) * factors.v,
            log_decay=factors.log_decay,
            beta=beta,  # the erase is -beta k
            b=(alpha if alpha.ndim == k.ndim else alpha.unsqueeze(-1)) * k,
            scale=k.shape[-1] ** -0.5,
            initial_state=factors.initial_state,
        )

    def output_dtype(self, arguments: Mapping[str, Any]) -> torch.dtype:
        return arguments["query"].dtype

    def wants_state(self, arguments: Mapping[str, Any]) -> bool:
        return bool(arguments["output_final_state"])

    def read_result(self, native: Any, arguments: Mapping[str, Any]) -> OpResult:
        return OpResult(*native)

    def write_result(self, result: OpResult, arguments: Mapping[str, Any]) -> Any:
        return tuple(result)
