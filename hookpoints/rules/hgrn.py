"""HGRN in fla (Qin et al., arXiv 2311.04823): a vector each channel of which decays by itself.

    s_t = exp(g_t) * s_{t-1} + x_t,    o_t = s_t

It is a matrix state of one row: one head with K = 1 and V = input_dim, whose keys and queries are 1, and whose write is
the row x_t. Each entry has its own decay, as in Mamba-1, here with rates of 1. So there is no ``hook_q`` and no
``hook_k``; ``hook_v`` is x, ``hook_log_decay`` is g, [B,T,H,V], and each channel has its own pattern. The ops know
neither heads nor keys: they take and return [B,T,V], and states [B,V].
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from hookpoints.rules.base import Arguments, FlaRule, Names, OpFactors, OpResult, compute_dtype


class Hgrn(FlaRule):
    """See above."""

    def head_shape(self, mixer: nn.Module) -> tuple[int, int, int]:
        return 1, 1, getattr(mixer, self.sizes[1])

    def factors(self, arguments: Arguments) -> OpFactors:
        dtype = compute_dtype(arguments[self.names.v])
        x, g = (self.read(field, arguments, dtype) for field in ("v", "log_decay"))
        ones = torch.ones_like(x[..., :1])
        state = arguments["initial_state"]
        return OpFactors(
            ones, ones, x, log_decay=g, initial_state=None if state is None else _row_matrix(state).to(dtype)
        )

    def read(self, field: str, arguments: Arguments, dtype: torch.dtype) -> Tensor:
        return arguments[self.argument(field, arguments)].unsqueeze(2).to(dtype)

    def rates(self, factors: OpFactors, arguments: Arguments) -> Tensor:
        return factors.v.new_ones(1, 1, factors.v.shape[-1])

    def feed(self, field: str, x: Tensor, arguments: Arguments) -> Tensor:
        return super().feed(field, x.squeeze(2), arguments)

    def read_result(self, native: object, arguments: Arguments) -> OpResult:
        outputs, state = cast("tuple[Tensor, Tensor | None]", native)
        return OpResult(outputs.unsqueeze(2), None if state is None else _row_matrix(state))

    def write_result(self, result: OpResult, arguments: Arguments) -> object:
        state = result.final_state
        return result.outputs.squeeze(2), None if state is None else state.flatten(1)


HGRN = Hgrn(
    "HGRN", ("chunk_hgrn", "fused_recurrent_hgrn"), Names(None, None, "x", log_decay="g"), sizes=("1", "input_dim")
)


def _row_matrix(state: Tensor) -> Tensor:
    """[B,V] as [B,H,K,V]."""
    return state[:, None, None]
