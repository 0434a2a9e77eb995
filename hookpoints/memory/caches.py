"""What a Hugging Face cache holds. All knowledge of how caches store their tensors is here."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache

from hookpoints.errors import UnsupportedModelError
from hookpoints.layer.context import count_tokens, drop_sources

if TYPE_CHECKING:
    from transformers.cache_utils import LinearAttentionLayer


def tensors_of(cache: Cache) -> dict[str, Tensor]:
    """Every tensor of a cache by its place, "layer/attribute/key": ``1/keys/``, ``0/conv_states/0`` ..."""
    tensors: dict[str, Tensor] = {}
    for number, layer in enumerate(cache.layers):
        for name, value in vars(layer).items():
            entries = value if isinstance(value, dict) else {"": value}
            tensors |= {f"{number}/{name}/{key}": x for key, x in entries.items() if isinstance(x, Tensor)}
    return tensors


def fill(cache: Cache, tensors: Mapping[str, Tensor]) -> None:
    """Replace tensors by place."""
    for place, x in tensors.items():
        layer, name, key = place.split("/")
        attributes: dict[str, Any] = vars(cache.layers[int(layer)])
        if key:
            attributes[name][int(key)] = x
        else:
            attributes[name] = x


def state_of(cache: Cache, layer: int, value_first: bool) -> Tensor:
    """The state [B,H,K,V] of a recurrent layer; a view. ``value_first``: whether the cache has it turned.

    Raises:
        UnsupportedModelError: the cache keeps it in a form that is not known here (fla's own caches).
    """
    state = tensors_of(cache).get(f"{layer}/recurrent_states/0")
    if state is None:
        raise UnsupportedModelError(
            f"layer {layer}: expected its state in recurrent_states of the cache, as transformers has it, got a "
            f"{type(cache.layers[layer]).__name__} with {', '.join(vars(cache.layers[layer]))}"
        )
    state = state.mT if value_first else state
    return state.unsqueeze(1) if state.ndim == 3 else state  # Mamba-1 knows no heads


def put_state(cache: Cache, layer: int, state: Tensor, value_first: bool) -> None:
    """Replace the state of a recurrent layer by ``state`` [B,H,K,V], or by a copy through which gradients pass."""
    place = f"{layer}/recurrent_states/0"
    there = tensors_of(cache)[place]
    turned_back = (state.mT if value_first else state).to(there.dtype)
    fill(cache, {place: turned_back.contiguous().view(-1, *there.shape[1:])})


def attention_of(cache: Cache, tokens: int) -> dict[str, Tensor]:
    """Keys and values of attention layers by place, turned to [B,T,H,D].

    Raises:
        UnsupportedModelError: a layer does not hold all ``tokens`` (a sliding window), or holds more than keys and
            values, so that no part can be cut from it.
    """
    attention: dict[str, Tensor] = {}
    for place, x in tensors_of(cache).items():
        if not place.endswith(("/keys/", "/values/")):
            continue
        number = place.split("/")[0]
        layer = cache.layers[int(number)]
        is_partial = x.shape[-2] != tokens or getattr(layer, "is_sliding", False)
        if is_partial or hasattr(layer, "indexer_keys"):
            raise UnsupportedModelError(
                f"layer {number}: expected a cache with keys and values of all {tokens} tokens, got a "
                f"{type(layer).__name__}: nothing can be cut from it"
            )
        attention[place] = x.transpose(1, 2)
    return attention


def shared(cache: Cache) -> Cache:
    """Another cache with the same tensors. Tensors of one can be replaced (``fill``, ``put_state``) without the other;
    one that is written in place changes in both."""
    branch = copy.copy(cache)
    branch.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in branch.layers:
        vars(layer).update({name: dict(value) for name, value in vars(layer).items() if isinstance(value, dict)})
        vars(layer).pop("update_recurrent_state", None)  # that of `chosen_rows` is bound to the other's layer
    return branch


def cut(cache: Cache, tokens: int) -> Cache:
    """What ``cache``, which recorded its past, held after ``tokens`` tokens; it shares tensors with it. Recurrent
    states are still the last ones (``put_state``)."""
    branch = shared(cache)
    for layer in branch.layers:
        vars(layer).update(record_past=False)
    cropped: dict[str, Tensor] = {}
    for place, x in tensors_of(branch).items():
        layer, name, key = place.split("/")
        if name in ("keys", "values"):
            cropped[place] = x[..., :tokens, :]
        elif name == "conv_states":  # the last inputs, with zeros before the first token
            size = vars(branch.layers[int(layer)])["conv_kernel_size"][int(key)]
            seen = x[..., max(0, tokens - size) : tokens]
            cropped[place] = F.pad(seen, (size - seen.shape[-1], 0))
    fill(branch, cropped)
    count_tokens(branch, tokens)
    drop_sources(branch)
    return branch


def window(cache: Cache) -> int:
    """How many of the last tokens convolutions and token shifts hold; 1 where there are none."""
    return max(_convolution_sizes(cache), default=1)


def reach(cache: Cache) -> int:
    """How many tokens after a token see it directly: kernel size - 1 for a convolution, 1 for a token shift."""
    return max((max(size - 1, 1) for size in _convolution_sizes(cache)), default=0)


def attends_and_convolves(cache: Cache) -> bool:
    """Whether a layer holds attention's keys and convolutions, so that these may depend on what was attended to."""
    layers = [place.split("/")[0] for place in tensors_of(cache) if place.endswith("/keys/")]
    return any(place.startswith(f"{layer}/conv_states/") for place in tensors_of(cache) for layer in layers)


def _convolution_sizes(cache: Cache) -> list[int]:
    """How many tokens each convolution and token shift holds."""
    return [x.shape[-1] for place, x in tensors_of(cache).items() if "/conv_states/" in place]


def chosen_rows(cache: Cache, rows: Tensor) -> Cache:
    """A copy with ``rows`` [N] of the cache, in this order; a row may come several times. In grad mode, gradients pass
    from what reads the copy to the states of ``cache``."""
    copied = shared(cache)
    tensors = tensors_of(cache)
    fill(copied, {place: x.index_select(0, rows.to(x.device)) for place, x in tensors.items()})
    if any(len(rows) != len(x) for x in tensors.values()):
        drop_sources(copied)
    if torch.is_grad_enabled():
        # Upstream writes the new state over the old one, which autograd saved for the backward pass.
        for layer in copied.layers:
            vars(layer).update(update_recurrent_state=MethodType(_replaced_state, layer))
    return copied


def joined_rows(caches: Sequence[Cache]) -> Cache:
    """A copy with the rows of several caches, one after the other."""
    named = [tensors_of(cache) for cache in caches]
    joined = shared(caches[0])
    fill(joined, {place: torch.cat([tensors[place] for tensors in named]) for place in named[0]})
    drop_sources(joined)
    return joined


def _replaced_state(layer: LinearAttentionLayer, recurrent_states: Tensor, state_idx: int = 0, **_: object) -> Tensor:
    """What ``update_recurrent_state`` of a cache's layer does, without writing over the state that was there."""
    layer.recurrent_states[state_idx] = recurrent_states
    return recurrent_states


def turned(model: nn.Module, backbone: nn.Module | None, keys: Tensor, by: int) -> Tensor:
    """Keys [B,T,H,D] with rotary positions moved ``by`` tokens, by the model's own rotary embedding; as they are where
    the model has none. Whether this is what the model does with its keys, the caller has to check."""
    apply = getattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", None)
    rotary = getattr(backbone, "rotary_emb", None)
    if apply is None or rotary is None:
        return keys
    positions = torch.full((keys.shape[0], 1), by, device=keys.device)
    scaling = getattr(rotary, "attention_scaling", 1.0)  # once in the keys already
    # accelerate gives them on the device of the embedding
    cos, sin = (angle.to(keys.device) / scaling for angle in rotary(keys, positions))
    return apply(keys, keys, cos, sin, unsqueeze_dim=2)[1]
