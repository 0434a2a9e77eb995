"""Token ids and attention masks, checked before a model sees them: upstream takes many that it then gets wrong."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from hookpoints.errors import InputError
from hookpoints.model.config import HookedRecurrentConfig


def check_tokens(tokens: Tensor, cfg: HookedRecurrentConfig) -> None:
    """Raise InputError unless ``tokens`` are ids [B,T] of the vocabulary, at least one of them. Warns where a model
    with attention gets more tokens than its configuration names; recurrent layers set no limit.

    Costs one look at the ids, on a GPU a synchronisation.
    """
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise InputError(f"input must be text or token ids [B,T], found {tokens.dtype} {list(tokens.shape)}")
    if tokens.numel() == 0:
        raise InputError(
            f"input is empty: tokens of shape {list(tokens.shape)}; at least one row of one token is needed"
        )
    low, high = (int(x) for x in torch.aminmax(tokens))
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


def check_mask(mask: Tensor, tokens: Tensor, cached: bool = False) -> None:
    """Raise InputError unless ``mask`` says which of ``tokens`` [B,T] are real, in a form that recurrent layers obey.

    A recurrent layer skips padding before the first token and after the last one, not between; and positions (of
    edits, of hooks) are the same in all rows only if all rows are padded on one side.

    Args:
        mask: [B,T] of 0 and 1; with a cache [B,past+T].
        cached: whether the pass continues a cache.
    """
    rows, width = tokens.shape
    if mask.ndim != 2 or mask.shape[0] != rows or mask.shape[1] < width or (mask.shape[1] > width and not cached):
        expected = f"[{rows},{width}]" if not cached else f"[{rows},past+{width}]"
        raise InputError(f"attention_mask must be {expected}, 1 for real tokens; found {list(mask.shape)}")
    if bool(((mask != 0) & (mask != 1)).any()):
        raise InputError("attention_mask must hold 0 and 1 only; found other values")
    real = mask != 0
    if bool((~real.any(1)).any()):
        raise InputError(f"attention_mask leaves no token in row {int((~real.any(1)).nonzero()[0])}")
    changes = (real[:, 1:] != real[:, :-1]).sum(1)
    left, right = ~real[:, 0], ~real[:, -1]
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


def check_prompt_mask(mask: Tensor) -> None:
    """Raise InputError for a prompt [B,T] padded on the right: generation goes on after the last column."""
    if not bool((mask[:, -1] != 0).all()):
        raise InputError("generate needs prompts padded on the left; attention_mask ends with padding in some row")
