"""Rows of factors that stay in the files of a collection until they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sae_lens_writesae.atom.low_rank import LowRank

RowIndex = slice | Sequence[int] | Tensor
"""Which rows."""


class Mapped:
    """Rows [N,...] that lie in several memory-mapped tensors, indexed as one tensor is. What is indexed is read."""

    device = torch.device("cpu")

    def __init__(self, parts: Sequence[Tensor]):
        self.parts = list(parts)
        self.dtype = parts[0].dtype
        sizes = torch.tensor([len(part) for part in parts])
        self.ends = sizes.cumsum(0)
        self.starts = self.ends - sizes
        self.shape = torch.Size([int(self.ends[-1]), *parts[0].shape[1:]])
        self.nbytes = sum(part.nbytes for part in parts)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: RowIndex) -> Tensor:
        if isinstance(index, Tensor) and index.dtype == torch.long:
            rows = index.where(index >= 0, index + len(self))  # a batch, for which nothing of length N is made
        else:
            rows = torch.arange(len(self))[index]
        out = torch.empty(*rows.shape, *self.shape[1:], dtype=self.dtype)
        order = rows.argsort()  # so that each file is read once, and forward
        part_numbers = torch.bucketize(rows[order], self.ends, right=True)
        numbers, counts = part_numbers.unique_consecutive(return_counts=True)
        in_parts = rows[order] - self.starts[part_numbers]
        sizes = counts.tolist()
        for n, place, in_part in zip(numbers.tolist(), order.split(sizes), in_parts.split(sizes)):
            out.index_copy_(0, place, self.parts[n].index_select(0, in_part))
        return out

    def to(self, device: torch.device) -> Tensor:
        """All rows on a device. It holds them twice for a moment, and the host only what it sends."""
        return torch.cat([part.to(device) for part in self.parts])


@dataclass(frozen=True)
class CollectedWrites:
    """The N writes of a head in a collection, which stay on disk. `rows` reads some."""

    name: str
    """The collection's hash, layer and head. Writes of one name are equal."""
    keys: Mapped = field(compare=False)
    """[N,R,K]"""
    values: Mapped = field(compare=False)
    """[N,R,V]"""

    def __len__(self) -> int:
        return len(self.keys)

    def rows(self, index: RowIndex) -> LowRank:
        """Some of the writes, in memory."""
        return LowRank(self.keys[index], self.values[index])

    def to(self, device: torch.device) -> LowRank:
        """All of them on a device."""
        return LowRank(self.keys.to(device), self.values.to(device))


Writes = LowRank | CollectedWrites
"""What dictionaries of writes are trained on."""
