"""Mamba-2 (Dao & Gu, arXiv 2405.21060): Mamba2, Bamba, Falcon-H1, Zamba2, Nemotron-H, Granite hybrids.

    S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)^T,    o_t = S_t^T C_t

with q = C and k = B shared by groups of heads, v = x, beta = dt and one A < 0 per head. Two ops compute it: the scan of
a sequence, and the update by one token, which has no time axis and changes the cache's state in place, so that
hookpoints' own kernel computes it where gradients are asked for. Both keep states value-first; here they are turned.

What the ops add outside the state, the skip D x and in some Falcon-H1 models the gate silu(z), is subtracted
and added again by ``write_result``: hooks see S^T C alone, and editing v leaves the skip as it is. The torch ops keep
the same arithmetic in the same order, so still bit-identical; mamba_ssm's kernels would have rounded once less.

The scan clamps dt from below (``dt_limit``), the update does not. Where a model sets a limit (Nemotron-H and Zamba2:
``time_step_min``) upstream's own decoding therefore differs a little from its prefill.
"""

from __future__ import annotations

from collections.abc import Set
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from hookpoints.rules.base import (
    CONVOLUTIONS,
    Arguments,
    Names,
    OpFactors,
    OpResult,
    Rule,
    compute_dtype,
    expand_groups,
    is_update,
)


class Mamba2(Rule):
    """See above."""

    def factors(self, arguments: Arguments) -> OpFactors:
        x = arguments["hidden_states"]
        B = arguments["B"]
        C = arguments["C"]
        if is_update(arguments):
            x = x.unsqueeze(1)
            B = B.unsqueeze(1)
            C = C.unsqueeze(1)
        heads = x.shape[2]
        dtype = compute_dtype(x)
        dt, A = _step_size(arguments)
        state = arguments["state"] if is_update(arguments) else arguments["initial_states"]
        return OpFactors(
            q=expand_groups(C.to(dtype), heads),
            k=expand_groups(B.to(dtype), heads),
            v=x.to(dtype),
            beta=dt.to(dtype),
            log_decay=A.to(dtype) * dt.to(dtype),
            # A copy: the update overwrites the state that it is given.
            initial_state=None if state is None else state.mT.to(dtype).clone(),
        )

    def arguments(self, arguments: Arguments, factors: OpFactors, changed: Set[str]) -> Arguments:
        update = is_update(arguments)
        fed: dict[str, object] = {"D": None, "z": None} if update else {"D": None}
        # The ops take one number of groups for both B and C, so that expanded ones go in together.
        inputs = changed & {"v"} | ({"q", "k"} if changed & {"q", "k"} else set())
        fed |= {getattr(self.names, field): _without_time(getattr(factors, field), update) for field in inputs}
        if changed & self.torch_only:
            fed |= _separate_arguments(factors, update)
        return {**arguments, **fed}

    def output_dtype(self, arguments: Arguments) -> torch.dtype:
        x = arguments["hidden_states"]
        return x.dtype if is_update(arguments) else compute_dtype(x)

    def wants_state(self, arguments: Arguments) -> bool:
        return is_update(arguments) or bool(arguments["return_final_states"])

    def value_first(self, arguments: Arguments) -> bool:
        return True

    def read_result(self, native: object, arguments: Arguments) -> OpResult:
        if is_update(arguments):
            return OpResult(cast(Tensor, native).unsqueeze(1), arguments["state"].mT.clone())
        outputs, state = native if isinstance(native, tuple) else (cast(Tensor, native), None)
        return OpResult(outputs, None if state is None else state.mT)

    def write_result(self, result: OpResult, arguments: Arguments) -> object:
        x = arguments["hidden_states"]
        D = arguments["D"]
        state = result.final_state
        if not is_update(arguments):
            outputs = result.outputs
            if D is not None:
                outputs = outputs + D[..., None] * x.to(outputs.dtype)
            outputs = outputs.contiguous()  # Falcon-H1 takes a view of it
            return outputs if state is None else (outputs, state.mT)
        assert state is not None
        outputs = result.outputs.squeeze(1)
        dtype = result.outputs.dtype
        if D is not None:
            outputs = (outputs + x.to(dtype) * D).to(dtype)
        if arguments["z"] is not None:
            outputs = (outputs * F.silu(arguments["z"])).to(dtype)
        arguments["state"].copy_(state.mT)
        return outputs


MAMBA2 = Mamba2(
    "Mamba-2",
    ("mamba2_chunk_scan", "mamba2_selective_state_update"),
    Names("C", "B", "hidden_states", beta="dt", log_decay="A"),
    sizes=("ssm_state_size", "head_dim"),
    default_scale=1.0,
    companions=CONVOLUTIONS,
    fused=("mamba2_split_conv1d_scan_combined",),
    torch_only=frozenset({"beta", "log_decay"}),
    overwrites=True,
)


def _step_size(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """dt [B,T,H] after bias, softplus and clamp, and A [H], in the ops' own order and dtypes."""
    dt = arguments["dt"]
    A = arguments["A"]
    bias = arguments["dt_bias"]
    if is_update(arguments):  # upstream expands these over the value and key sides
        dt = dt[..., 0].unsqueeze(1)
        A = A[:, 0, 0]
        bias = None if bias is None else bias[:, 0]
    if bias is not None:
        dt = dt + bias.to(dt.dtype)
    if arguments["dt_softplus"]:
        dt = F.softplus(dt)
    if not is_update(arguments):
        dt = dt.clamp(*arguments["dt_limit"])
    return dt, A


def _separate_arguments(factors: OpFactors, update: bool) -> dict[str, object]:
    """Arguments that feed the write strength and the decay apart, though the op takes one dt for both: u as x, the
    decay as an A per token, and dt = 1."""
    assert factors.beta is not None and factors.log_decay is not None
    u = factors.beta.unsqueeze(-1) * factors.v
    decay = factors.log_decay
    fed: dict[str, object] = {"hidden_states": _without_time(u, update), "dt_bias": None, "dt_softplus": False}
    if update:
        decay = decay.squeeze(1).unsqueeze(-1)
        return {**fed, "dt": torch.ones_like(decay), "A": decay.unsqueeze(-1)}
    return {**fed, "dt": torch.ones_like(decay), "A": decay, "dt_limit": (0.0, float("inf"))}


def _without_time(tensor: Tensor, update: bool) -> Tensor:
    return tensor.squeeze(1) if update else tensor
