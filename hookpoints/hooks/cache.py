"""Hooks that keep activations. TransformerLens' own take the time axis from the end; here the hook table tells it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hookpoints.hooks.table import is_matrix, time_axis

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint
    from transformer_lens.utilities.slice import Slice, SliceInput

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None
"""A hook's name, several, a predicate on names, or None for every vector hook."""


@dataclass(frozen=True, eq=False, repr=False)
class Saving:
    """A hook that keeps what it is given, and changes nothing."""

    saved: dict[str, Tensor]
    suffix: str
    device: torch.device | str | None
    remove_batch_dim: bool
    cut: Slice

    def __call__(self, tensor: Tensor, hook: HookPoint) -> None:
        name = str(hook.name)
        value = self.cut.apply(tensor.detach().to(self.device), dim=time_axis(name))
        self.saved[name + self.suffix] = value[0] if self.remove_batch_dim else value


def caching_hooks(
    points: Mapping[str, HookPoint],
    names_filter: NamesFilter = None,
    incl_bwd: bool = False,
    device: torch.device | str | None = None,
    remove_batch_dim: bool = False,
    cache: dict[str, Tensor] | None = None,
    pos_slice: SliceInput | Slice = None,
) -> tuple[dict[str, Tensor], list[tuple[str, Saving]], list[tuple[str, Saving]]]:
    """As TransformerLens' ``get_caching_hooks`` over the hook ``points``: (cache, forward hooks, backward hooks).
    Activations are detached and shared, not copied."""
    from transformer_lens.utilities.slice import Slice  # loaded with the model that has the points

    saved: dict[str, Tensor] = {} if cache is None else cache
    is_named = _name_predicate(names_filter)
    save, save_grad = (
        Saving(saved, suffix, device, remove_batch_dim, Slice.unwrap(pos_slice)) for suffix in ("", "_grad")
    )
    names = [name for name in points if is_named(name)]
    return saved, [(name, save) for name in names], [(name, save_grad) for name in names if incl_bwd]


def reachable(names_filter: NamesFilter, start: int | None, stop: int | None, n_layers: int) -> NamesFilter:
    """Narrow an open filter (None or a predicate) to hooks that a partial run reaches; explicit names stay as asked."""
    if names_filter is not None and not callable(names_filter):
        return names_filter if isinstance(names_filter, str) else list(names_filter)
    is_named = _name_predicate(names_filter)
    first, last, _ = slice(start, stop).indices(n_layers)

    @functools.wraps(is_named)  # errors name the caller's filter
    def inside(name: str) -> bool:
        if not is_named(name):
            return False
        if name.startswith("blocks."):
            return first <= int(name.split(".")[1]) < last
        return last == n_layers if name.startswith("ln_final") else start is None

    return inside


def _name_predicate(names_filter: NamesFilter) -> Callable[[str], bool]:
    if names_filter is None:
        return lambda name: not is_matrix(name)
    if callable(names_filter):
        return names_filter
    return ({names_filter} if isinstance(names_filter, str) else set(names_filter)).__contains__
