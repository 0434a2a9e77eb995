"""Random recurrences of each rule, for tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from hookpoints.recurrence.canonical import carried_keys
from hookpoints.recurrence.recurrence import Recurrence


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(seed: int, *shape: int) -> Tensor:
    """The same, where every tensor has a seed of its own."""
    return normal(*shape, seed=seed)


@dataclass(frozen=True)
class Form:
    """What distinguishes the rules, once their factors are known."""

    decay: Literal["none", "head", "channel"] = "none"
    """No decay, one per head, or one per key channel."""
    erase: Literal["none", "delta", "aside", "free"] = "none"
    """None; along the write key and reading with it, as in the delta rules; along the write key but reading with a key
    of its own; or along a direction of its own."""
    read_before_write: bool = False
    rank: int = 1
    """Terms that a token writes, and erases where there is an erase."""


FORMS = {
    "gdn": Form("head", "delta"),
    "deltanet": Form("none", "delta"),
    "kda": Form("channel", "delta"),
    "gla": Form("channel"),
    "mamba2": Form("head"),
    "rwkv6": Form("channel", read_before_write=True),
    "rwkv7": Form("channel", "free"),
    "comba": Form("head", "aside"),
    "gated_deltaproduct": Form("head", "delta", rank=2),
}
"""The rules by name: Gated DeltaNet, DeltaNet, KDA, GLA, Mamba-2, RWKV-6, RWKV-7, Comba, Gated DeltaProduct."""


def random_recurrence(
    form: str | Form,
    *,
    B: int = 1,
    T: int = 64,
    H: int = 2,
    K: int = 8,
    V: int = 6,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    most_beta: float = 1.0,
    strongest_decay: float = 0.3,
    resets: bool = False,
    initial_state: bool = False,
    declare_beta: bool = True,
) -> Recurrence:
    """A recurrence of the given form: unit keys, normal values, beta uniform in (0, `most_beta`), log-decays uniform
    in (-`strongest_decay`, 0), and -inf at every third token under `resets`. `declare_beta=False` leaves a = -beta k
    for the general kernel to deal with.

    Equal arguments give equal numbers. The factors are drawn on the CPU.
    """
    form = FORMS[form] if isinstance(form, str) else form
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=dtype)

    heads = (B, T, H)
    terms = heads if form.rank == 1 else (*heads, form.rank)
    q, k, u = normal(*heads, K), F.normalize(normal(*terms, K), dim=-1), normal(*terms, V)
    decays = {"none": None, "head": heads, "channel": (*heads, K)}[form.decay]
    log_decay = None if decays is None else -strongest_decay * uniform(*decays)
    if resets and log_decay is not None:
        log_decay[:, ::3] = -torch.inf
    beta = a = b = None
    if form.erase in ("delta", "aside"):
        beta = most_beta * uniform(*terms)
        b = _decayed(k if form.erase == "delta" else F.normalize(k + normal(*terms, K), dim=-1), log_decay)
        if form.rank > 1:
            k = carried_keys(k, beta)
        a, u = -beta[..., None] * k, beta[..., None] * u
    elif form.erase == "free":
        direction = F.normalize(normal(*terms, K), dim=-1)
        a, b = direction * uniform(*terms, K) / form.rank, -direction
    return Recurrence(
        q,
        k,
        u,
        log_decay,
        a,
        b,
        scale=K**-0.5,
        initial_state=normal(B, H, K, V) if initial_state else None,
        read_before_write=form.read_before_write,
        beta=beta if declare_beta else None,
    )


def _decayed(k: Tensor, log_decay: Tensor | None) -> Tensor:
    if log_decay is None:
        return k
    alpha = (log_decay if log_decay.ndim == 4 else log_decay[..., None]).exp()
    return k * (alpha if k.ndim == 4 else alpha[..., None, :])


def entrywise(r: Recurrence) -> Recurrence:
    """With a decay for each entry of the state instead, as in Mamba-1; needs an initial state."""
    return r.without_erase().replace(log_decay=-r.u.abs() / 4, rates=r.starting_state()[0].abs())
