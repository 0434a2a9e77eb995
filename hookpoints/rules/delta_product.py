"""Gated DeltaProduct (Siems et al., arXiv 2502.10297) in fla: a token is R steps of the delta rule.

    S <- alpha_t S,   then for r = 1..R:   S <- (I - beta_r k_r k_r^T) S + beta_r k_r v_r^T,   o_t = S^T (K^-1/2 q_t)

The token as a whole writes a matrix of rank R and erases along R directions, all of which read the state before it
(see ``carried_keys``). So factors have an axis for the steps, [B,T,H,R,K], and all else is per token.

Two ops compute it. One knows of steps; the other is the gated delta rule itself, called with T*R tokens, zeros for the
decay of later steps and for the reads of earlier ones, whose outputs the layer leaves out.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from hookpoints.recurrence.canonical import carried_keys
from hookpoints.rules.base import Arguments, FlaRule, OpFactors, OpResult, Rule

_OF_A_STEP = ("k", "v", "beta")
"""Factors that each step has; the others belong to the token."""


class GatedDeltaProduct(FlaRule):
    """The rule of fla's ``chunk_gated_delta_product``, and of ``fused_recurrent_gated_delta_rule`` in its layers. Its
    ``rank`` is R, as the mixer has it; calls of the second op do not tell."""

    def for_mixer(self, mixer: nn.Module) -> Rule:
        return replace(self, rank=int(getattr(mixer, "num_householder")))  # noqa: B009 (its type is int here)

    def read(self, field: str, arguments: Arguments, dtype: torch.dtype) -> Tensor | None:
        x = super().read(field, arguments, dtype)
        if x is None or self.rank == 1:
            return x
        if field in _OF_A_STEP:
            return x.unflatten(1, (-1, self.rank)).transpose(2, 3)  # [B,T*R,H,...] to [B,T,H,R,...]
        if self._is_stepwise(arguments):
            return x[:, self._step_of(field) :: self.rank]
        return x

    def write_key(self, factors: OpFactors) -> Tensor:
        assert factors.beta is not None
        return carried_keys(factors.k, factors.beta) if self.rank > 1 else factors.k

    def feed(self, field: str, x: Tensor, arguments: Arguments) -> Tensor:
        if field in _OF_A_STEP and self.rank > 1:
            x = x.transpose(2, 3).flatten(1, 2)
        elif field not in _OF_A_STEP and self._is_stepwise(arguments):
            x = self._at_step(x, self._step_of(field))
        return super().feed(field, x, arguments)

    def read_result(self, native: object, arguments: Arguments) -> OpResult:
        result = super().read_result(native, arguments)
        last = slice(self.rank - 1, None, self.rank) if self._is_stepwise(arguments) else slice(None)
        return result._replace(outputs=result.outputs[:, last])

    def write_result(self, result: OpResult, arguments: Arguments) -> object:
        if self._is_stepwise(arguments):
            result = result._replace(outputs=self._at_step(result.outputs, self.rank - 1))
        return super().write_result(result, arguments)

    @staticmethod
    def _is_stepwise(arguments: Arguments) -> bool:
        """Whether the call is one of the gated delta rule, with T*R tokens."""
        return "num_householder" not in arguments

    def _step_of(self, field: str) -> int:
        """The step of a token that the decay (the first) or the read (the last) belongs to."""
        return 0 if field == "log_decay" else self.rank - 1

    def _at_step(self, x: Tensor, step: int) -> Tensor:
        """[B,T,H,...] as [B,T*R,H,...]: what belongs to one step of each token, zeros for the others."""
        steps = torch.zeros_like(x).unsqueeze(2).repeat_interleave(self.rank, dim=2)
        steps[:, :, step] = x
        return steps.flatten(1, 2)


GATED_DELTA_PRODUCT = GatedDeltaProduct(
    "Gated DeltaProduct", ("chunk_gated_delta_product", "fused_recurrent_gated_delta_rule"), erases=True
)
