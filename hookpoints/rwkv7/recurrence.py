"""The recurrence of RWKV-7 as one operation, called by keyword: what hooks intercept."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hookpoints.recurrence.recurrence import Recurrence


class StateResult(NamedTuple):
    """Reads and the state that they leave."""

    outputs: Tensor
    """[B,T,H,V], in the dtype of ``v``."""
    final_state: Tensor | None
    """[B,H,K,V], or None where it was not asked for."""


def rwkv7_recurrence(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> StateResult:
    """S_t = diag(exp(w_t)) S_{t-1} + b_t (S_{t-1}^T a_t)^T + k_t v_t^T,  o_t = S_t^T (scale r_t).

    The arguments are those of flash-linear-attention's ``chunk_rwkv7``. Chunked, in float32 (float64 for float64),
    differentiable. RWKV-7 (Peng et al. 2025, arXiv 2503.14456), eq. 17.

    Args:
        r: [B,T,H,K] receptance, which reads.
        w: [B,T,H,K] natural log of the decay.
        k: [B,T,H,K] key that is written.
        v: [B,T,H,V] value that is written.
        a: [B,T,H,K] what the erase reads back with: minus the normalised erase key.
        b: [B,T,H,K] where the erase acts: the erase key times the in-context rate.
        scale: factor on r.
        initial_state: [B,H,K,V]; None for zeros.
        output_final_state: whether to return the state after the last token.
    """
    form = Recurrence(q=r, k=k, u=v, log_decay=w, a=b, b=a, scale=scale, initial_state=initial_state)
    outputs, state = form.scan()
    return StateResult(outputs.to(v.dtype), state if output_final_state else None)
