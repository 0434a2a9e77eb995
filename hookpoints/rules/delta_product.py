"""Gated DeltaProduct (Siems et al., arXiv 2502.10297) in fla: a token is R steps of the delta rule.

    S <- alpha_t S,   then for r = 1..R:   S <- (I - beta_r k_r k_r^T) S + beta_r k_r v_r^T,   o_t = S^T (K^-1/2 q_t)

The token as a whole writes a matrix of rank R and erases along R directions, all of which read the state before it
(``hookpoints.recurrence.product``). So factors have an axis for the steps, [B,T,H,R,K], and everything else is per token.

Two ops compute it. One knows of steps; the other is the gated delta rule itself, called with T*R tokens, zeros for the
decay of later steps and for the reads of earlier ones, whose outputs the layer leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn

from hookpoints.recurrence.product import carried_keys
from hookpoints.recurrence.recurrence import Recurrence
from hookpoints.rules.base import Factors, OpResult, compute_dtype, l2_normalise
from hookpoints.rules.fla_base import FlaRule, initial_state, scale_of


class FlaGatedDeltaProduct(FlaRule):
    """The rule of fla's ``chunk_gated_delta_product``, and of ``fused_recurrent_gated_delta_rule`` in its layers.

    Args:
        steps: R, as the mixer has it; calls of the second op do not tell.
    """

    name = "Gated DeltaProduct"
    ops = ("chunk_gated_delta_product", "fused_recurrent_gated_delta_rule")
    factor_names = ("q", "k", "v", "beta", "log_decay")

    def __init__(self, steps: int = 1):
        self.rank = steps

    def for_mixer(self, mixer: nn.Module) -> FlaGatedDeltaProduct:
        return FlaGatedDeltaProduct(int(mixer.num_householder))  # type: ignore[arg-type]

    def factors(self, arguments: Mapping[str, Any]) -> Factors:
        dtype = compute_dtype(arguments["v"])
        q, k, decay = arguments["q"].to(dtype), arguments["k"].to(dtype), arguments["g"]
        if arguments["use_qk_l2norm_in_kernel"]:
            q, k = l2_normalise(q), l2_normalise(k)
        if self._stepwise(arguments):
            q, decay = q[:, self.rank - 1 :: self.rank], None if decay is None else decay[:, :: self.rank]
        return Factors(
            q=q,
            k=self._by_token(k),
            v=self._by_token(arguments["v"].to(dtype)),
            beta=self._by_token(arguments["beta"].to(dtype)),
            log_decay=None if decay is None else decay.to(dtype),
            initial_state=initial_state(arguments, dtype),
        )

    def arguments(self, arguments: Mapping[str, Any], factors: Factors, changed: Set[str]) -> dict[str, Any]:
        fed: dict[str, Any] = {}
        if changed & {"q", "k"}:  # one flag normalises both inside the op
            fed = {"q": factors.q, "k": self._by_step(factors.k), "use_qk_l2norm_in_kernel": False}
        if "v" in changed:
            fed["v"] = self._by_step(factors.v)
        if "beta" in changed and factors.beta is not None:
            fed["beta"] = self._by_step(factors.beta)
        if "log_decay" in changed and factors.log_decay is not None:
            fed["g"] = factors.log_decay
        if self._stepwise(arguments):
            for name, step in (("q", self.rank - 1), ("g", 0)):
                if name in fed:
                    fed[name] = self._at_step(fed[name], step)
        dtype = arguments["v"].dtype
        return {**arguments, **{name: x.to(dtype) if name in ("q", "k", "v") else x for name, x in fed.items()}}

    def recurrence(self, factors: Factors, arguments: Mapping[str, Any]) -> Recurrence:
        assert factors.beta is not None
        k, beta, decay = factors.k, factors.beta, factors.log_decay
        return Recurrence(
            q=factors.q,
            k=carried_keys(k, beta) if self.rank > 1 else k,
            u=beta.unsqueeze(-1) * factors.v,
            log_decay=decay,
            beta=beta,  # the erase is along the write's own keys
            b=k if decay is None else decay.exp().reshape(*decay.shape, *[1] * (k.ndim - 3)) * k,
            scale=scale_of(arguments),
            initial_state=factors.initial_state,
        )

    def read_result(self, native: Any, arguments: Mapping[str, Any]) -> OpResult:
        result = super().read_result(native, arguments)
        if not self._stepwise(arguments):
            return result
        return result._replace(outputs=result.outputs[:, self.rank - 1 :: self.rank])

    def write_result(self, result: OpResult, arguments: Mapping[str, Any]) -> Any:
        if self._stepwise(arguments):
            result = result._replace(outputs=self._at_step(result.outputs, self.rank - 1))
        return super().write_result(result, arguments)

    @staticmethod
    def _stepwise(arguments: Mapping[str, Any]) -> bool:
        """Whether the call is one of the gated delta rule, with T*R tokens."""
        return "num_householder" not in arguments

    def _by_token(self, x: Tensor) -> Tensor:
        """[B,T*R,H,...] as [B,T,H,R,...]; without the axis where R = 1."""
        return x if self.rank == 1 else x.unflatten(1, (-1, self.rank)).transpose(2, 3)

    def _by_step(self, x: Tensor) -> Tensor:
        """The way back."""
        return x if self.rank == 1 else x.transpose(2, 3).flatten(1, 2)

    def _at_step(self, x: Tensor, step: int) -> Tensor:
        """[B,T,H,...] as [B,T*R,H,...]: what belongs to one step of each token, zeros for the others."""
        spread = torch.zeros_like(x).unsqueeze(2).repeat_interleave(self.rank, dim=2)
        spread[:, :, step] = x
        return spread.flatten(1, 2)
