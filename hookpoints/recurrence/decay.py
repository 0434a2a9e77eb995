"""Decay inside chunks of tokens, one per head or one per key channel, in forms that cannot overflow.

Write D(i->t) for the decay that a write at token i has met once token t has written, and D(0->t) for what the
state before the chunk has met. The naive exp(c_t) exp(-c_i) of a cumulated log-decay c overflows float32 after
88 nats. Here c is cumulated in float64, and every exponent is <= 0 or small enough for float64.

Axes: N = B*H rows, n chunks, C tokens of a chunk, K key channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ANCHORED = 32
"""Most tokens in a chunk under per-channel decay: they share one anchor."""

_UNDERFLOW = -750.0
"""exp of it is 0 in float64. Log-decays per head are cut here, so that -inf works and sums stay precise."""

_CHANNEL_FLOOR = -40.0
"""Log-decays per channel are cut here: exp of it, 4e-18, is below float64's epsilon, and the 16 tokens on
either side of the anchor (640 nats) stay within float64's range (709 nats)."""


class Read(NamedTuple):
    """Vectors that read the state, one per token."""

    vectors: Tensor
    """[N,n,C,K]."""
    before: bool
    """Whether they read before the token's own decay and write."""


class Decay(ABC):
    """Decay over n chunks of C tokens. `edges` [N,n,C+1,1 or K] is log D(0->t) in float64, 0 first."""

    def __init__(self, edges: Tensor, dtype: torch.dtype):
        self.edges = edges
        self.dtype = dtype
        size = edges.shape[-2] - 1
        self.later = torch.ones(size, size, dtype=torch.bool, device=edges.device).triu(1)

    @abstractmethod
    def scores(self, reads: Sequence[Read], keys: Sequence[Tensor]) -> list[list[Tensor]]:
        """x_t^T D(i->t) key_i for each read and each keys [N,n,C,K]: [N,n,C,C], zero for writes not yet seen."""

    def from_start(self, read: Read) -> Tensor:
        """D(0->t) x_t, [N,n,C,K]: what reads the state before the chunk."""
        edges = self.edges[..., :-1, :] if read.before else self.edges[..., 1:, :]
        return read.vectors * self._decay_factors(edges)

    def to_end(self, keys: Tensor) -> Tensor:
        """D(i->end) key_i, [N,n,C,K]: what is left of the chunk's writes in the state after it."""
        return keys * self._decay_factors(self.edges[..., -1:, :] - self.edges[..., 1:, :])

    def over_chunk(self) -> Tensor:
        """D(0->end) of each chunk as a factor on states, [N,n,1,1] or [N,n,K,1]."""
        return self._decay_factors(self.edges[..., -1, :, None])

    @cached_property
    def since(self) -> Tensor:
        """D(0->t), what the state before a chunk has met at each token: [N,n,C,1,1] or [N,n,C,K,1]."""
        return self._decay_factors(self.edges[..., 1:, :, None])

    def between(self, chunk: int, rows: slice | list[int], columns: slice) -> Tensor:
        """D(i->t) for t in rows and i in columns, zero for i > t: [N,p,c,1] or [N,p,c,K]."""
        edges = self.edges[:, chunk, 1:]
        gap = (edges[:, rows][:, :, None] - edges[:, None, columns]).to(self.dtype)
        return gap.masked_fill_(self.later[rows, columns, None], -torch.inf).exp()

    def _decay_factors(self, log: Tensor) -> Tensor:
        return log.to(self.dtype).exp()


class HeadDecay(Decay):
    """One decay per head: pairwise differences, masked before the exponential."""

    def __init__(self, log: Tensor, dtype: torch.dtype):
        """`log`: [N,n,C]."""
        total = log.to(wide_dtype(log)).clamp(min=_UNDERFLOW).cumsum(-1)
        super().__init__(F.pad(total, (1, 0))[..., None], dtype)
        gap = (total[..., :, None] - total[..., None, :]).to(dtype)
        self.pairs = gap.masked_fill_(self.later, -torch.inf).exp()

    def between(self, chunk: int, rows: slice | list[int], columns: slice) -> Tensor:
        """See `Decay.between`."""
        return self.pairs[:, chunk, rows, columns, None]

    def scores(self, reads: Sequence[Read], keys: Sequence[Tensor]) -> list[list[Tensor]]:
        """See `Decay.scores`."""
        seen = {False: self.pairs}
        if any(read.before for read in reads):
            # What a token sees before its own write is what the token before it saw after its own.
            seen[True] = F.pad(self.pairs[..., :-1, :], (0, 0, 1, 0))
        return [[_key_overlap(read, key) * seen[read.before] for key in keys] for read in reads]


class ChannelDecay(Decay):
    """One decay per key channel: both sides are scaled about the chunk's middle, in float64."""

    def __init__(self, log: Tensor, dtype: torch.dtype):
        """`log`: [N,n,C,K] with C <= ANCHORED."""
        size = log.shape[-2]
        wide = log.to(wide_dtype(log)).clamp(min=_CHANNEL_FLOOR)
        # A product with a triangle of ones: five times faster than cumsum along a strided axis.
        total = torch.ones(size, size, dtype=wide.dtype, device=log.device).tril() @ wide
        super().__init__(F.pad(total, (0, 0, 1, 0)), dtype)

    def scores(self, reads: Sequence[Read], keys: Sequence[Tensor]) -> list[list[Tensor]]:
        """See `Decay.scores`."""
        size = self.edges.shape[-2] - 1
        about = self.edges - self.edges[..., (size + 1) // 2, None, :]
        shrunk = [key * (-about[..., 1:, :]).exp() for key in keys]
        result = []
        for read in reads:
            grown = read.vectors * (about[..., :-1, :] if read.before else about[..., 1:, :]).exp()
            # The unseen half may hold inf or nan; tril replaces it, in the backward pass too.
            result.append([(grown @ key.mT).tril(-1 if read.before else 0).to(self.dtype) for key in shrunk])
        return result


def decay_of(log: Tensor | None, like: Tensor) -> Decay:
    """Decay over chunks from log-decays [N,n,C] or [N,n,C,K]; none at all counts as one per head of 0."""
    log = like.new_zeros(like.shape[:-1]) if log is None else log
    if log.ndim == 3:
        return HeadDecay(log, like.dtype)
    return ChannelDecay(log, like.dtype)


def _key_overlap(read: Read, key: Tensor) -> Tensor:
    """x_t^T key_i, [N,n,C,C]. What an erase reads back goes through a solve that magnifies rounding (nearly
    equal keys with beta near 2 most of all), so it is summed in float64: a fifth of the error at little cost."""
    wide = wide_dtype(key) if read.before else key.dtype
    return (read.vectors.to(wide) @ key.to(wide).mT).to(key.dtype)


def wide_dtype(x: Tensor) -> torch.dtype:
    """The most precise dtype where x lives: float64, but float32 on Apple GPUs, which have no other."""
    return torch.float32 if x.device.type == "mps" else torch.float64
