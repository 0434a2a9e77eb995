"""RWKV-6 (Peng et al., arXiv 2404.05892, section 4) in fla: a token reads the state before it writes.

    o_t = S_{t-1}^T r_t + <r_t, bonus * k_t> v_t,    S_t = diag(alpha_t) S_{t-1} + k_t v_t^T

with one decay per key channel. So a write, and an edit of it, is read from the next token on. What a token sees of
itself, the bonus, is not in the state: it is left out of the op and put back by ``write_result``, so that ``hook_read``
has S^T r alone and the bonus stays what the layer's own r, k and v make it.
"""

from __future__ import annotations

from collections.abc import Set

import torch

from hookpoints.rules.base import Arguments, FlaRule, Names, OpFactors, OpResult, compute_dtype


class FlaRWKV6(FlaRule):
    """The rule of fla's ``chunk_rwkv6`` and ``fused_recurrent_rwkv6``."""

    name = "RWKV-6"
    ops = ("chunk_rwkv6", "fused_recurrent_rwkv6")
    names = Names("r", "k", "v", log_decay="w")
    rounded = frozenset({*FlaRule.rounded, "log_decay"})
    read_before_write = True

    def arguments(self, arguments: Arguments, factors: OpFactors, changed: Set[str]) -> Arguments:
        return {**super().arguments(arguments, factors, changed), "u": torch.zeros_like(arguments["u"])}

    def write_result(self, result: OpResult, arguments: Arguments) -> object:
        r, k, v, bonus = (arguments[name].to(compute_dtype(arguments["v"])) for name in ("r", "k", "v", "u"))
        scale = k.shape[-1] ** -0.5 if arguments.get("scale") is None else float(arguments["scale"])
        itself = scale * (r * bonus * k).sum(-1, keepdim=True) * v
        outputs = (result.outputs.to(itself.dtype) + itself).to(result.outputs.dtype)
        return super().write_result(result._replace(outputs=outputs), arguments)
