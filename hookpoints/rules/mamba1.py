"""Mamba-1 (Gu & Dao, arXiv 2312.00752, eq. 2 and 4): Mamba, Falcon-Mamba, Jamba.

    S_t = exp(dt_t A) * S_{t-1} + B_t (dt_t * x_t)^T,    o_t = S_t^T C_t

with one head, K = state_size and V = d_inner; q = C, k = B, v = x and beta = dt, a step size for each value channel.
The write has rank 1. The decay is elementwise: A < 0 is K x V, and so each entry of the state has its own decay,
exp(log_decay_t[v] rates[k,v]) with log_decay = -dt and rates = -A. The two are held apart, V numbers a token and K V a
layer: their product would be as large as all states. So ``hook_beta`` and ``hook_log_decay`` are [B,T,H,V]: dt as the
write meets it and -dt as the decay does, and an edit of one leaves the other alone. The weight with which token t reads
what s wrote depends on the value channel, so that ``hook_pattern`` is [B,V,T,S] (Ali et al., arXiv 2403.01590).

Two ops compute it: the scan of a sequence, and the update by one token, which has no time axis and changes the cache's
state in place. Both keep states value-first, [B,V,K], and know no heads. The scan takes no state: upstream, which reads
several tokens after a cache, continues its convolution and begins its state with zeros. A hooked layer begins with the
cache's state, by hookpoints' own kernel.

What the ops add outside the state, the skip D x and the gate silu(z), is subtracted and added again as in ``mamba2``.
"""

from __future__ import annotations

from collections.abc import Set
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hookpoints.rules.base import CONVOLUTIONS, Arguments, Names, OpFactors, OpResult, Rule, compute_dtype, is_update


class Mamba1(Rule):
    """See above."""

    def head_shape(self, mixer: nn.Module) -> tuple[int, int, int]:
        return 1, getattr(mixer, self.sizes[0]), getattr(mixer, self.sizes[1])

    def read(self, field: str, arguments: Arguments, dtype: torch.dtype) -> Tensor:
        if field in ("beta", "log_decay"):
            step = self._step_size(arguments).to(dtype)
            return step if field == "beta" else -step
        return _canonical_factor(arguments[self.argument(field, arguments)], arguments).to(dtype)

    def factors(self, arguments: Arguments) -> OpFactors:
        dtype = compute_dtype(arguments["hidden_states"])
        fields = {field: self.read(field, arguments, dtype) for field in self.names.fields()}
        state = arguments.get("state", arguments.get("initial_state"))
        # A copy: the update overwrites the state that it is given.
        return OpFactors(**fields, initial_state=None if state is None else state.mT.unsqueeze(1).to(dtype).clone())

    def rates(self, factors: OpFactors, arguments: Arguments) -> Tensor:
        return -arguments["A"].mT.unsqueeze(0).to(factors.k.dtype)

    def arguments(self, arguments: Arguments, factors: OpFactors, changed: Set[str]) -> Arguments:
        fed: dict[str, object] = {"D": None, "z": None}
        for field in changed - self.not_fed:
            name = self.argument(field, arguments)
            fed[name] = _native_factor(getattr(factors, field), arguments).to(arguments[name].dtype)
        return {**arguments, **fed}

    def value_first(self, arguments: Arguments) -> bool:
        return True

    def wants_state(self, arguments: Arguments) -> bool:
        return is_update(arguments) or bool(arguments["return_last_state"])

    def read_result(self, native: object, arguments: Arguments) -> OpResult:
        outputs, state = native if isinstance(native, tuple) else (cast(Tensor, native), arguments.get("state"))
        return OpResult(_canonical_factor(outputs, arguments), None if state is None else state.mT.unsqueeze(1).clone())

    def write_result(self, result: OpResult, arguments: Arguments) -> object:
        outputs = _native_factor(result.outputs, arguments)
        x = arguments["hidden_states"]
        D = arguments["D"]
        state = None if result.final_state is None else result.final_state.squeeze(1).mT.contiguous()
        if D is not None:
            outputs = outputs + x * (D if is_update(arguments) else D[:, None])
        if arguments["z"] is not None:
            outputs = outputs * F.silu(arguments["z"])
        if not is_update(arguments):
            return outputs if state is None else (outputs, state)
        arguments["state"].copy_(state)
        return outputs.to(x.dtype)

    def _step_size(self, arguments: Arguments) -> Tensor:
        """dt [B,T,H,V] after bias and softplus, in the ops' own order and dtypes."""
        bias, softplus = ("dt_bias", "dt_softplus") if is_update(arguments) else ("delta_bias", "delta_softplus")
        dt = _canonical_factor(arguments["dt"], arguments)
        if arguments[bias] is not None:
            dt = dt + arguments[bias].to(dt.dtype)
        return F.softplus(dt) if arguments[softplus] else dt


MAMBA1 = Mamba1(
    "Mamba-1",
    ("mamba_selective_scan", "mamba_selective_state_update"),
    Names("C", "B", "hidden_states", beta="dt", log_decay="A"),
    sizes=("ssm_state_size", "intermediate_size"),
    default_scale=1.0,
    companions=CONVOLUTIONS,
    fused=("mamba_inner_fn",),
    not_fed=frozenset({"beta", "log_decay"}),
    starts_from_zero=True,
    overwrites=True,
)


def _canonical_factor(x: Tensor, arguments: Arguments) -> Tensor:
    """[B,X,T], or [B,X] of an update, as [B,T,1,X]."""
    return (x.unsqueeze(-1) if is_update(arguments) else x).transpose(1, 2).unsqueeze(2)


def _native_factor(x: Tensor, arguments: Arguments) -> Tensor:
    """The way back."""
    x = x.squeeze(2).transpose(1, 2)
    return x.squeeze(-1) if is_update(arguments) else x
