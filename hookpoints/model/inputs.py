"""What a model is given: ids and masks, checked (upstream takes many that it then gets wrong),
and the arguments that continue a cache."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from transformers import Cache

from hookpoints.errors import InputError
from hookpoints.model.config import HookedRecurrentConfig
from hookpoints.recurrence.canonical import is_dense

_CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""What transformers' versions and families call the cache argument of a model."""


def as_tokens(input: object) -> Tensor:
    """Token ids in a dtype that models take; other integers (uint8, say) are made long.

    Raises:
        InputError: something that no dense tensor of integers is made from (None, rows of unequal length, floats).
    """
    try:
        tokens = torch.as_tensor(input)
        if not is_dense(tokens) or tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise TypeError(f"{tokens.layout} {tokens.dtype}")
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"input must be text or token ids [B,T], got {input!r:.80} ({error})") from error
    return tokens if tokens.dtype == torch.int32 else tokens.long()


def check_loss(tokens: Tensor, mask: Tensor | None) -> None:
    """Raise InputError where a mean loss would be over no token at all, and so NaN."""
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else as_mask(mask) != 0
    if not bool((real[:, 1:] & real[:, :-1]).any()):
        raise InputError(
            f"a loss needs a token and one before it, got tokens of shape {list(tokens.shape)}"
            + ("" if mask is None else " with this attention_mask")
        )


def check_tokens(tokens: Tensor, cfg: HookedRecurrentConfig) -> None:
    """Raise InputError unless ``tokens`` are ids [B,T] of the vocabulary, at least one of them. Warns where a model
    with attention gets more tokens than its configuration names; recurrent layers set no limit.

    Costs one look at the ids, for which a GPU is waited for.
    """
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise InputError(
            f"input must be text or token ids [B,T], at least one, got {tokens.dtype} {list(tokens.shape)}"
        )
    low, high = map(int, torch.aminmax(tokens.cpu()))
    if low < 0 or high >= cfg.d_vocab:
        raise InputError(
            f"token id {low if low < 0 else high} is outside the vocabulary of {cfg.model_name}, "
            f"which has ids 0 to {cfg.d_vocab - 1}: do tokenizer and model belong together?"
        )
    if tokens.shape[1] > cfg.n_ctx and len(cfg.layers) < cfg.n_layers:
        warnings.warn(
            f"{tokens.shape[1]} tokens, but the attention layers of {cfg.model_name} are made for {cfg.n_ctx}",
            stacklevel=4,
        )


def as_mask(mask: object) -> Tensor:
    """``mask``, or InputError for what is no dense tensor."""
    if not is_dense(mask):
        raise InputError(f"attention_mask must be a dense tensor of 0 and 1, got {mask!r:.80}")
    return mask


def check_mask(mask: Tensor, tokens: Tensor, cached: bool = False) -> None:
    """Raise InputError unless ``mask`` says which of ``tokens`` [B,T] are real, in a form that recurrent layers obey.

    A recurrent layer skips padding before the first token and after the last one, not between; and positions (of
    edits, of hooks) are the same in all rows only if all rows are padded on one side.

    Args:
        mask: [B,T] of 0 and 1; with a cache [B,past+T].
        cached: whether the pass continues a cache.
    """
    real = as_mask(mask) != 0
    rows, width = tokens.shape
    if mask.ndim != 2 or mask.shape[0] != rows or mask.shape[1] < width or (mask.shape[1] > width and not cached):
        expected = f"[{rows},{width}]" if not cached else f"[{rows},past+{width}]"
        raise InputError(f"attention_mask must be {expected}, 1 for real tokens; got {list(mask.shape)}")
    if bool(((mask != 0) & (mask != 1)).any()):
        raise InputError("attention_mask must hold 0 and 1 only; got other values")
    if bool((~real.any(1)).any()):
        raise InputError(f"attention_mask leaves no token in row {int((~real.any(1)).nonzero()[0])}")
    changes = (real[:, 1:] != real[:, :-1]).sum(1)
    left = ~real[:, 0]
    right = ~real[:, -1]
    holes = changes > left.long() + right.long()
    if bool(holes.any()):
        raise InputError(
            f"attention_mask has a hole in row {int(holes.nonzero()[0])}: a recurrent layer cannot skip padding "
            "between tokens; take those tokens out"
        )
    if bool(left.any()) and bool(right.any()):
        raise InputError(
            f"attention_mask pads row {int(left.nonzero()[0])} on the left and row {int(right.nonzero()[0])} on the "
            "right; pad all rows on one side"
        )


def cache_argument(model: nn.Module) -> str:
    """What this Hugging Face model calls its cache."""
    return next(name for name in _CACHE_NAMES if name in inspect.signature(model.forward).parameters)


def cache_of(output: Mapping[str, object]) -> Cache:
    """The cache that a model returned; its name there need not be the argument's."""
    return next(cast(Cache, output[name]) for name in _CACHE_NAMES if name in output)


def continuing(model: nn.Module, cache: Cache | None, position: int, tokens: Tensor) -> dict[str, object]:
    """Arguments with which upstream reads ``tokens`` [B,T] from ``position`` on, after ``cache``. It is told positions
    where it takes any: with a recurrent first block it may not know where a cache continues."""
    where = torch.arange(position, position + tokens.shape[1], device=tokens.device).expand_as(tokens)
    arguments: dict[str, object] = {"use_cache": True}
    if "position_ids" in inspect.signature(model.forward).parameters:
        arguments["position_ids"] = where
    if cache is not None:
        arguments[cache_argument(model)] = cache
    return arguments
