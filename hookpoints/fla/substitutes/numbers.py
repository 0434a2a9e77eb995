"""Dtypes and packed sequences, as fla's kernels treat them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor


def working_dtype(x: Tensor) -> torch.dtype:
    """What a kernel computes in: float32, here float64 where the input is."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def sequences(cu_seqlens: Tensor) -> Iterator[slice]:
    """Where each sequence lies on the time axis of a packed batch [1, sum T, ...]."""
    bounds = cu_seqlens.tolist()
    return (slice(start, stop) for start, stop in itertools.pairwise(bounds))
