"""Comba (Hu et al., arXiv 2506.02475) in fla: the erase reads with a key of its own, and before the decay.

    S_t = alpha_t S_{t-1} + beta_t k_t (v_t - S_{t-1}^T p_t)^T,    o_t = S_t^T (K^-1/2 q_t)

with q, k and p l2-normalised inside the op and alpha one scalar per head. The layer makes p a multiple of k, so that
its norm alone, which the op takes away again, differs; and q has D p taken off before it comes here. This is what fla's
kernels compute; its ``naive_recurrent_comba`` decays p and is another rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from torch import Tensor

from hookpoints.recurrence.recurrence import Recurrence
from hookpoints.rules.base import Factors, compute_dtype, expand_groups, l2_normalise
from hookpoints.rules.fla_base import FlaRule, initial_state, scale_of

_OTHERS = {"v": "v", "beta": "beta", "log_decay": "g"}


class FlaComba(FlaRule):
    """The rule of fla's ``chunk_comba`` and ``fused_recurrent_comba``."""

    name = "Comba"
    ops = ("chunk_comba", "fused_recurrent_comba")
    factor_names = ("q", "k", "v", "beta", "log_decay")

    def factors(self, arguments: Mapping[str, Any]) -> Factors:
        v = arguments["v"]
        dtype = compute_dtype(v)
        return Factors(
            q=_key(arguments, "q"),
            k=_key(arguments, "k"),
            v=v.to(dtype),
            beta=arguments["beta"].to(dtype),
            log_decay=arguments["g"].to(dtype),
            back=_key(arguments, "p"),
            initial_state=initial_state(arguments, dtype),
        )

    def arguments(self, arguments: Mapping[str, Any], factors: Factors, changed: Set[str]) -> dict[str, Any]:
        fed: dict[str, Any] = {}
        if changed & {"q", "k"}:  # one flag normalises them and p inside the op
            assert factors.back is not None
            dtype = arguments["v"].dtype
            fed = {name: x.to(dtype) for name, x in (("q", factors.q), ("k", factors.k), ("p", factors.back))}
            fed["use_qk_l2norm_in_kernel"] = False
        fed |= {
            name: getattr(factors, field).to(arguments[name].dtype)
            for field, name in _OTHERS.items()
            if field in changed
        }
        return {**arguments, **fed}

    def recurrence(self, factors: Factors, arguments: Mapping[str, Any]) -> Recurrence:
        assert factors.beta is not None
        return Recurrence(
            q=factors.q,
            k=factors.k,
            u=factors.beta.unsqueeze(-1) * factors.v,
            log_decay=factors.log_decay,
            beta=factors.beta,  # the erase is -beta k
            b=factors.back,
            scale=scale_of(arguments),
            initial_state=factors.initial_state,
        )


def _key(arguments: Mapping[str, Any], name: str) -> Tensor:
    """q, k or p [B,T,H,K] as the rule uses it."""
    x = arguments["k"] if arguments[name] is None else arguments[name]
    x = x.to(compute_dtype(arguments["v"]))
    return expand_groups(l2_normalise(x) if arguments["use_qk_l2norm_in_kernel"] else x, arguments["v"].shape[2])
