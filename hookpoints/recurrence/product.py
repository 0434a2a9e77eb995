"""Several delta steps as one token (Gated DeltaProduct, Siems et al., arXiv 2502.10297)."""

from __future__ import annotations

import torch
from torch import Tensor


def carried_keys(k: Tensor, beta: Tensor) -> Tensor:
    """The keys of a token's R delta steps as its last step leaves them, [B,T,H,R,K].

    A token takes the steps S <- (I - beta_r k_r k_r^T) S + beta_r k_r v_r^T one after the other. What step r writes is
    moved by the steps after it, so that the token as a whole is

        S_t = (I - sum_r k~_r (beta_r k_r)^T) S_{t-1} + sum_r k~_r (beta_r v_r)^T,
        k~_r = (I - beta_R k_R k_R^T) ... (I - beta_{r+1} k_{r+1} k_{r+1}^T) k_r :

    a write of rank R, an erase of rank R along the write's own keys, and both read the state before the token.

    Args:
        k: [B,T,H,R,K] keys in the order of the steps.
        beta: [B,T,H,R].

    Cost O(R^2 K) per token and head.
    """
    carried: list[Tensor] = []
    for key, strength in zip(k.unbind(3), beta.unbind(3)):
        moved = [x - (strength * (x * key).sum(-1))[..., None] * key for x in carried]
        carried = [*moved, key]
    return torch.stack(carried, dim=3)
