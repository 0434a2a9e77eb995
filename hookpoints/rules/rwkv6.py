"""RWKV-6 (Peng et al., arXiv 2404.05892, section 4) in fla: a token reads the state before it writes.

    o_t = S_{t-1}^T r_t + <r_t, bonus * k_t> v_t,    S_t = diag(alpha_t) S_{t-1} + k_t v_t^T

with one decay per key channel. So a write, and an edit of it, is read from the next token on. What a token sees of
itself, the bonus, is not in the state: it is left out of the op and put back by ``write_result``, so that ``hook_read``
has S^T r alone and the bonus stays what the layer's own r, k and v make it.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch

from hookpoints.recurrence.recurrence import Recurrence
from hookpoints.rules.base import Factors, OpResult, compute_dtype
from hookpoints.rules.fla_base import FlaRule, initial_state, scale_of

_OWN = {"q": "r", "k": "k", "v": "v", "log_decay": "w"}


class FlaRWKV6(FlaRule):
    """The rule of fla's ``chunk_rwkv6`` and ``fused_recurrent_rwkv6``."""

    name = "RWKV-6"
    ops = ("chunk_rwkv6", "fused_recurrent_rwkv6")
    factor_names = ("q", "k", "v", "log_decay")

    def factors(self, arguments: Mapping[str, Any]) -> Factors:
        dtype = compute_dtype(arguments["v"])
        own = {field: arguments[name].to(dtype) for field, name in _OWN.items()}
        return Factors(**own, initial_state=initial_state(arguments, dtype))

    def arguments(self, arguments: Mapping[str, Any], factors: Factors, changed: Set[str]) -> dict[str, Any]:
        fed = {
            name: getattr(factors, field).to(arguments[name].dtype) for field, name in _OWN.items() if field in changed
        }
        return {**arguments, **fed, "u": torch.zeros_like(arguments["u"])}

    def recurrence(self, factors: Factors, arguments: Mapping[str, Any]) -> Recurrence:
        return Recurrence(
            q=factors.q,
            k=factors.k,
            u=factors.v,
            log_decay=factors.log_decay,
            scale=scale_of(arguments),
            initial_state=factors.initial_state,
            read_before_write=True,
        )

    def write_result(self, result: OpResult, arguments: Mapping[str, Any]) -> Any:
        r, k, v, bonus = (arguments[name].to(compute_dtype(arguments["v"])) for name in ("r", "k", "v", "u"))
        own = scale_of(arguments) * (r * bonus * k).sum(-1, keepdim=True) * v
        outputs = (result.outputs.to(own.dtype) + own).to(result.outputs.dtype)
        return super().write_result(result._replace(outputs=outputs), arguments)
