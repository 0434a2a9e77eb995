"""What fla's RWKV-7 layers compute around the recurrence: mixes with the token before, the key, the bonus and gate."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def addcmul(
    hidden_states: Tensor,
    delta: Tensor,
    xr: Tensor,
    xw: Tensor,
    xk: Tensor,
    xv: Tensor,
    xa: Tensor,
    xg: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """x + delta * mix for each mix [1,1,D]; None where there is no ``xg``. x and delta [B,T,D]."""
    mixes = (xr, xw, xk, xv, xa, xg)
    return tuple(None if mix is None else hidden_states.addcmul(delta, mix) for mix in mixes)


def key(k: Tensor, a: Tensor, ka: Tensor, cu_seqlens: Any = None, cu_seqlens_cpu: Any = None) -> Tensor:
    """k (1 + (a - 1) ka), all [B,T,D] but ka [D]."""
    return k.addcmul(k * (a - 1), ka)


def gated_bonus(o: Tensor, r: Tensor, k: Tensor, r_k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """(o + (r . r_k k) v) g with o and g [B,T,H*V], r and k [B,T,H,K], r_k [H,K], v [B,T,H,V]."""
    bonus = (r * k * r_k).sum(-1, keepdim=True) * v
    return (o + bonus.reshape(o.shape)) * g
