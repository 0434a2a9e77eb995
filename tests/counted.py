"""What an op would cost on CUDA, counted with the line of this project that called it.

An op is a launch, unless it only looks at memory. A sync is a wait of the host for a number or a shape. Launches read
and write `bytes`; `bus` are the bytes that cross between host and device.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = f"{Path(__file__).parents[1]}/"
PACKAGES = tuple(ROOT + name for name in ("hookpoints", "sae_lens_writesae", "writesae"))
KINDS = ("launch", "sync", "to_device", "to_host", "bytes", "bus")
_VIEWS = (
    "view _unsafe_view transpose t permute expand select slice squeeze unsqueeze detach alias split split_with_sizes "
    "unbind as_strided diagonal unfold lift_fresh lift _reshape_alias empty empty_like empty_strided new_empty set_ "
    "new_empty_strided resize_ real view_as_real view_as_complex"
)
VIEWS = set(_VIEWS.split())
_SYNCS = (
    "nonzero _unique2 unique_consecutive unique_dim masked_select equal is_nonzero bincount _local_scalar_dense histc "
    "multinomial _linalg_svd _linalg_eigh _linalg_check_errors linalg_lstsq"
)
SYNCS = set(_SYNCS.split())
PUTS = {"index_put", "index_put_", "_index_put_impl_"}
INDEXES = PUTS | {"index", "_unsafe_index"}
_GATHERS = "index_select gather embedding take index_add_ index_copy_ scatter_ scatter_add_"
GATHERS = INDEXES | set(_GATHERS.split())
"""They read only what they take."""


class Seen(collections.Counter):
    """Counts of (kind, op, line)."""

    def note(self, kind: str, op: str, n: int = 1) -> None:
        frame = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.startswith(PACKAGES):
            frame = frame.f_back
        line = "?" if frame is None else f"{frame.f_code.co_filename[len(ROOT) :]}:{frame.f_lineno}"
        self[kind, op, line] += n

    def op(self, name: str, args: tuple, kwargs: dict, out: object, device: torch.device) -> None:
        """Note one op that gave something on the device, or read from it."""
        tensors = tensors_of((args, kwargs))
        there = [x for x in tensors if x.device == device]
        if name in INDEXES:
            for index in args[1]:
                if index is not None and index.device != device:
                    self.note("to_device", "index")
                    self.note("bus", "index", size(index))
                elif index is not None and index.dtype == torch.bool:
                    filled = name in PUTS and args[2].numel() == 1  # one number, and no shape to wait for
                    self.note("sync", "mask", int(not filled))
        repeats = name == "repeat_interleave" and bool(tensors) and kwargs.get("output_size") is None
        if there and (name in SYNCS or repeats):
            self.note("sync", name)
        if name not in VIEWS and name != "_local_scalar_dense":
            self.note("launch", name)
            few = 2 * min(size(out), *map(size, tensors)) if name in GATHERS else size(out) + size(there)
            self.note("bytes", name, few)

    def copy(self, name: str, source: Tensor, target: Tensor) -> None:
        """Note a copy: a launch on the device, or a way over the bus."""
        if source.device != target.device:
            self.note("to_host" if target.device.type == "cpu" else "to_device", name)
            self.note("bus", name, size(target))
        elif target.device.type != "cpu":
            self.note("launch", name)
            self.note("bytes", name, size(source) + size(target))

    def of(self, work: Callable[[], object]) -> dict[str, int]:
        """The totals of one call."""
        self.clear()
        work()
        return {kind: sum(n for key, n in self.items() if key[0] == kind) for kind in KINDS}

    def worst(self, kind: str, by: int = 2) -> list[tuple[str, int]]:
        """Ten lines (by=2) or ops (by=1) with the most."""
        counts = collections.Counter()
        for key, count in self.items():
            if key[0] == kind and count:
                counts[key[by]] += count
        return counts.most_common(10)


def size(tree: object) -> int:
    return sum(x.numel() * x.element_size() for x in tensors_of(tree))


# What an op takes and gives is tensors in lists, tuples and dictionaries. PyTorch's pytrees, which know every other
# container as well, take four fifths of the time of a pass on the device.


def tensors_of(tree: object) -> list[Tensor]:
    """The tensors in the arguments of an op, or in what it gave."""
    if isinstance(tree, Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


def mapped(change: Callable[[Tensor], object], tree: Any) -> Any:
    """The same with each tensor changed."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {name: mapped(change, part) for name, part in tree.items()}
    if isinstance(tree, (list, tuple)):
        parts = [mapped(change, part) for part in tree]
        return parts if isinstance(tree, list) else tuple(parts)
    return tree
