"""How long a head remembers: the half-life of a write, in tokens."""

from typing import NamedTuple

import torch
from embedded_family import Transition
from torch import Tensor


class HeadMemory(NamedTuple):
    """Memory of one head of one recurrent layer."""

    layer: int  # counts recurrent layers only, from 0
    head: int
    decay: float  # mean over tokens of alpha, per token
    write: float  # mean over tokens of the write strength (beta or dt)
    half_life: float  # tokens, median over writes; equal to the horizon if longer


@torch.no_grad()
def half_lives(transition: Transition, horizon: int, stride: int = 4) -> Tensor:
    """Tokens until a write has lost half of its norm: [B, N, H], with N starting points, `stride` tokens
    apart.

    Follows p = k through p_t = alpha_t p + a_t <b_t, p>, decay and erase together, and takes the first t with
    |p_t| < |k| / 2. Writes that last longer are counted at `horizon`. Costs horizon steps over [B, N, H, K].
    """
    time = transition.key.shape[1]
    if time <= horizon:
        raise ValueError(f"a horizon of {horizon} tokens needs more than {time} tokens")
    starts = torch.arange(0, time - horizon, stride)
    p = transition.key[:, starts]
    half = p.norm(dim=-1) / 2
    life = torch.full(half.shape, float(horizon))
    for step in range(1, horizon):
        at = starts + step
        fresh = transition.alpha[:, at] * p
        if transition.a is not None and transition.b is not None:
            fresh = fresh + transition.a[:, at] * (transition.b[:, at] * p).sum(-1, keepdim=True)
        p = fresh
        reached = (p.norm(dim=-1) < half) & (life == horizon)
        life[reached] = step
        if bool((life < horizon).all()):
            break
    return life


def head_memories(layers: list[Transition], horizon: int, stride: int = 4) -> list[HeadMemory]:
    """Decay, write strength and half-life of every head of every recurrent layer."""
    table = []
    for index, layer in enumerate(layers):
        life = half_lives(layer, horizon, stride).flatten(0, 1).median(dim=0).values
        decay = layer.alpha.mean(dim=(0, 1, 3))
        write = layer.write.mean(dim=(0, 1))
        for head in range(len(life)):
            table.append(HeadMemory(index, head, float(decay[head]), float(write[head]), float(life[head])))
    return table


def share_of_long_memory(table: list[HeadMemory], tokens: int = 16) -> float:
    """Share of heads that keep half of a write's norm for at least `tokens` tokens."""
    return sum(row.half_life >= tokens for row in table) / len(table)
