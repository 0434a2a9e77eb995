"""Update rules that few people need, as a plug-in of hookpoints: Gated DeltaNet-2, Comba, SimpleGLA, RetNet and HGRN of
flash-linear-attention. ``pyproject.toml`` names each rule in the entry-point group ``hookpoints.rules``, and that is
all. To add your family, copy this folder and see the docstring of ``hookpoints.rules``.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from hookpoints.recurrence import CanonicalForm
from hookpoints.rules import Arguments, FlaRule, Names, OpFactors, OpResult
from hookpoints.rules.base import compute_dtype

# -- the delta rules: a token takes off what its key reads back before it writes


class _GatedDelta2(FlaRule):
    def read(self, field: str, arguments: Arguments, dtype: torch.dtype) -> Tensor | None:
        if field == "back":
            return arguments["b"].to(dtype)
        return super().read(field, arguments, dtype)

    def erase_key(self, factors: OpFactors) -> Tensor:
        assert factors.back is not None
        return factors.back * super().erase_key(factors)

    def form(self, factors: OpFactors, arguments: Arguments) -> CanonicalForm:
        return (
            super().form(factors, arguments).replace(beta=torch.ones_like(factors.k[..., 0]), b=self.erase_key(factors))
        )


GATED_DELTA_2 = _GatedDelta2(
    "Gated DeltaNet-2",
    ("chunk_gdn2", "fused_recurrent_gdn2"),
    Names("q", "k", "v", beta="w", log_decay="g", back="b"),
    own_erase=True,
)
"""Gated DeltaNet-2 (fla's layer ``GatedDeltaNet2``): a gate b for each key channel says what is erased, and a gate w
for each value channel what is written.

    S_t = (I - k_t (b_t * k_t)^T) diag(alpha_t) S_{t-1} + k_t (w_t * v_t)^T,    o_t = S_t^T (K^-1/2 q_t)

with q, k l2-normalized inside the op and one decay per key channel. w is beta, [B,T,H,V]. An edit of k moves the
erase b * k as well. With b = w = beta it is Kimi delta attention.
"""


class _Comba(FlaRule):
    def read(self, field: str, arguments: Arguments, dtype: torch.dtype) -> Tensor | None:
        return super().read("k" if field == "back" and arguments["p"] is None else field, arguments, dtype)

    def erase_key(self, factors: OpFactors) -> Tensor:
        assert factors.back is not None
        return factors.back


COMBA = _Comba(
    "Comba",
    ("chunk_comba", "fused_recurrent_comba"),
    Names("q", "k", "v", beta="beta", log_decay="g", back="p"),
    rounded=frozenset({"q", "k", "v", "back", "beta", "log_decay"}),
    erases=True,
)
"""Comba (Hu et al., arXiv 2506.02475): the erase reads with its own key, and before the decay.

    S_t = alpha_t S_{t-1} + beta_t k_t (v_t - S_{t-1}^T p_t)^T,    o_t = S_t^T (K^-1/2 q_t)

with q, k and p l2-normalized inside the op and alpha one scalar per head. The layer makes p a multiple of k, so that
p differs from k by its norm alone, which the op takes away again; and q has D p taken off before it comes here. This is
what fla's kernels compute; its ``naive_recurrent_comba`` decays p and is another rule.
"""

# -- additive rules

_WITHOUT_BETA = Names("q", "k", "v", log_decay="g")


class _SimpleGatedLinear(FlaRule):
    def read(self, field: str, arguments: Arguments, dtype: torch.dtype) -> Tensor | None:
        if field != "log_decay":
            return super().read(field, arguments, dtype)
        return self.log_decay(arguments).to(dtype).expand(arguments["v"].shape[:3])

    def log_decay(self, arguments: Arguments) -> Tensor:
        """[B,T,H], or [H] where it is the same at every token."""
        # One for each token, one for each head, or none.
        for name in ("g", "g_gamma"):
            if arguments.get(name) is not None:
                return arguments[name]
        return arguments["v"].new_zeros(())


class _Retention(_SimpleGatedLinear):
    def log_decay(self, arguments: Arguments) -> Tensor:
        heads = torch.arange(arguments["q"].shape[2], dtype=torch.float64, device=arguments["q"].device)
        return torch.log1p(-(2.0 ** (-5.0 - heads)))


SIMPLE_GLA = _SimpleGatedLinear(
    "SimpleGLA", ("chunk_simple_gla", "fused_recurrent_simple_gla", "fused_chunk_simple_gla"), _WITHOUT_BETA
)
"""Linear attention with one decay per head: SimpleGLA (arXiv 2312.06635, the rule of Mamba-2 and RetNet's).

    S_t = alpha_t S_{t-1} + k_t v_t^T,    o_t = S_t^T (scale q_t)
"""
RETNET = _Retention(
    "RetNet",
    ("chunk_retention", "fused_recurrent_retention", "fused_chunk_retention", "parallel_retention"),
    _WITHOUT_BETA,
    torch_only=frozenset({"log_decay"}),
)
"""RetNet (arXiv 2307.08621): head h always decays by 1 - 2^(-5-h), which its ops know and take no argument for, so that
another decay is never fed."""


class _Hgrn(FlaRule):
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


HGRN = _Hgrn(
    "HGRN", ("chunk_hgrn", "fused_recurrent_hgrn"), Names(None, None, "x", log_decay="g"), sizes=("1", "input_dim")
)
"""HGRN (Qin et al., arXiv 2311.04823): a vector each channel of which decays by itself.

    s_t = exp(g_t) * s_{t-1} + x_t,    o_t = s_t

It is a matrix state of one row: one head with K = 1 and V = input_dim, whose keys and queries are 1, and whose write is
the row x_t. Each entry has its own decay, as in Mamba-1, here with rates of 1. So there is no ``hook_q`` and no
``hook_k``; ``hook_v`` is x, ``hook_log_decay`` is g, [B,T,H,V], and each channel has its own pattern. The ops know
neither heads nor keys: they take and return [B,T,V], and states [B,V].
"""


def _row_matrix(state: Tensor) -> Tensor:
    """[B,V] as [B,H,K,V]."""
    return state[:, None, None]
