"""Hooks that keep activations. TransformerLens' own take the time axis from the end; here the hook table tells it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities.slice import Slice, SliceInput

from hookpoints.hooks.table import is_matrix, time_axis

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None
"""A hook's name, several, a predicate on names, or None for every vector hook."""
Saving = Callable[..., None]


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
    saved: dict[str, Tensor] = {} if cache is None else cache
    wanted = _name_predicate(names_filter)
    cut = Slice.unwrap(pos_slice)

    def save(suffix: str) -> Saving:
        def hook(tensor: Tensor, hook: HookPoint) -> None:
            name = str(hook.name)
            value = cut.apply(tensor.detach().to(device), dim=time_axis(name))
            saved[name + suffix] = value[0] if remove_batch_dim else value

        return hook

    names = [name for name in points if wanted(name)]
    return saved, [(name, save("")) for name in names], [(name, save("_grad")) for name in names if incl_bwd]


def reachable(names_filter: NamesFilter, start: int | None, stop: int | None, n_layers: int) -> NamesFilter:
    """Narrow an open filter (None or a predicate) to hooks that a partial run reaches; explicit names stay as asked."""
    if names_filter is not None and not callable(names_filter):
        return names_filter if isinstance(names_filter, str) else list(names_filter)
    wanted = _name_predicate(names_filter)
    first, last, _ = slice(start, stop).indices(n_layers)

    @functools.wraps(wanted)  # errors name the caller's filter
    def inside(name: str) -> bool:
        if not wanted(name):
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
