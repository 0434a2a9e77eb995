"""What a model is given: text turned into tokens, ids and masks checked (upstream takes many that it then gets wrong),
and the arguments that continue a cache."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedTokenizerBase

from hookpoints.errors import InputError
from hookpoints.recurrence.canonical import is_dense

if TYPE_CHECKING:
    from hookpoints.model.config import HookedRecurrentConfig

_CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""What transformers' versions and families call the cache argument of a model."""


def as_tokens(input: object, device: torch.device | None = None) -> Tensor:
    """Token ids in a dtype that models take; other integers (uint8, say) are made long.

    Raises:
        InputError: something that no dense tensor of integers is made from (None, rows of unequal length, floats).
    """
    try:
        tokens = torch.as_tensor(input, device=device)
        if not is_dense(tokens) or tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise TypeError(f"{tokens.layout} {tokens.dtype}")
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"input must be text or token ids [B,T], found {input!r:.80} ({error})") from error
    return tokens if tokens.dtype == torch.int32 else tokens.long()


def check_text(texts: object) -> list[str]:
    """``texts``, one or several, as a list.

    Raises:
        InputError: something else, or text with half of a surrogate pair, which no tokenizer takes.
    """
    rows = [texts] if isinstance(texts, str) else list(texts) if isinstance(texts, list | tuple) else []
    if not rows or not all(isinstance(text, str) for text in rows):
        raise InputError(f"text must be a string or a list of strings, found {texts!r:.80}")
    for text in rows:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"text must be Unicode, but character {error.start} is half of a surrogate pair") from None
    return rows


def check_loss(tokens: Tensor, mask: Tensor | None) -> None:
    """Raise InputError where a mean loss would be over no token at all, and so NaN."""
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else _real(mask)
    if not bool((real[:, 1:] & real[:, :-1]).any()):
        raise InputError(
            f"a loss needs a token and one before it, found tokens of shape {list(tokens.shape)}"
            + ("" if mask is None else " with this attention_mask")
        )


def check_tokens(tokens: Tensor, cfg: HookedRecurrentConfig) -> None:
    """Raise InputError unless ``tokens`` are ids [B,T] of the vocabulary, at least one of them. Warns where a model
    with attention gets more tokens than its configuration names; recurrent layers set no limit.

    Costs one look at the ids, on a GPU a synchronisation.
    """
    if tokens.ndim != 2:
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


def _real(mask: Tensor) -> Tensor:
    """Where ``mask`` is not 0. Raises InputError for what cannot be a mask."""
    if not is_dense(mask):
        raise InputError(f"attention_mask must be a dense tensor of 0 and 1, found {mask!r:.80}")
    return mask != 0


def check_mask(mask: Tensor, tokens: Tensor, cached: bool = False) -> None:
    """Raise InputError unless ``mask`` says which of ``tokens`` [B,T] are real, in a form that recurrent layers obey.

    A recurrent layer skips padding before the first token and after the last one, not between; and positions (of
    edits, of hooks) are the same in all rows only if all rows are padded on one side.

    Args:
        mask: [B,T] of 0 and 1; with a cache [B,past+T].
        cached: whether the pass continues a cache.
    """
    real = _real(mask)
    rows, width = tokens.shape
    if mask.ndim != 2 or mask.shape[0] != rows or mask.shape[1] < width or (mask.shape[1] > width and not cached):
        expected = f"[{rows},{width}]" if not cached else f"[{rows},past+{width}]"
        raise InputError(f"attention_mask must be {expected}, 1 for real tokens; found {list(mask.shape)}")
    if bool(((mask != 0) & (mask != 1)).any()):
        raise InputError("attention_mask must hold 0 and 1 only; found other values")
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


def cache_argument(model: nn.Module) -> str:
    """What this Hugging Face model calls its cache."""
    known = inspect.signature(model.forward).parameters
    return next(name for name in _CACHE_NAMES if name in known)


def cache_of(output: Mapping[str, Any]) -> Cache:
    """The cache that a model returned; its name there need not be the argument's."""
    return next(output[name] for name in _CACHE_NAMES if name in output)


def position_inputs(model: nn.Module, positions: Tensor) -> dict[str, Tensor]:
    """``positions`` [B,T] as an argument of the model, where it takes any: with a recurrent first block it may not
    know where a cache continues."""
    return {"position_ids": positions} if "position_ids" in inspect.signature(model.forward).parameters else {}


PaddingSide = Literal["left", "right"]


class TokenBatch(NamedTuple):
    """Tokens and which of them are real."""

    tokens: Tensor
    """[B,T] integer ids."""
    attention_mask: Tensor | None
    """[B,T], 1 for real tokens; None where nothing is padded."""


class Tokens:
    """Tokenizing methods of a hooked model, over ``tokenizer``, ``cfg`` and ``device``."""

    tokenizer: PreTrainedTokenizerBase | None

    if TYPE_CHECKING:

        @property
        def cfg(self) -> HookedRecurrentConfig: ...
        @cfg.setter
        def cfg(self, value: HookedRecurrentConfig) -> None: ...

    def to_tokens(
        self,
        input: str | list[str],
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Tensor:
        """Token ids [B,T] of text.

        Args:
            prepend_bos: True or False forces the begin-of-sequence token; None leaves it to the tokenizer, so that
                tokens are those that Hugging Face users get.
            padding_side: for lists of unequal length; None: the tokenizer's own.
            truncate: cut to the model's context length.
        """
        return self.tokenize(input, prepend_bos, padding_side, move_to_device, truncate).tokens

    def tokenize(
        self,
        input: str | list[str],
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> TokenBatch:
        """As ``to_tokens``, with the attention mask that padding needs."""
        tokenizer = self._need_tokenizer()
        texts = check_text(input)
        rows = [self._bos(tokenizer(text)["input_ids"], prepend_bos) for text in texts]
        if truncate:
            rows = [row[: self.cfg.n_ctx] for row in rows]
        width = max(map(len, rows))
        side = padding_side or tokenizer.padding_side
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad is None and any(len(row) < width for row in rows):
            raise ValueError("texts of unequal length need padding, but the tokenizer has no pad or eos token")
        tokens, mask = [], []
        for row in rows:
            filler, real = [pad] * (width - len(row)), [1] * len(row)
            tokens.append(filler + row if side == "left" else row + filler)
            empty = [0] * len(filler)
            mask.append(empty + real if side == "left" else real + empty)
        device = self.cfg.device if move_to_device else "cpu"
        padded = any(len(row) < width for row in rows)
        return TokenBatch(
            torch.tensor(tokens, dtype=torch.long, device=device),
            torch.tensor(mask, dtype=torch.long, device=device) if padded else None,
        )

    def to_string(self, tokens: Tensor | list[int] | int) -> str | list[str]:
        """Text of tokens: one string for [T], a list for [B,T]. Special tokens are kept."""
        tokenizer = self._need_tokenizer()
        tokens = as_tokens(tokens)
        if tokens.ndim == 2:
            return [str(tokenizer.decode(row, clean_up_tokenization_spaces=False)) for row in tokens.tolist()]
        return str(tokenizer.decode(tokens.reshape(-1).tolist(), clean_up_tokenization_spaces=False))

    def to_str_tokens(self, input: str | Tensor | list[int], prepend_bos: bool | None = None) -> list[str]:
        """Each token of one text, or of ids [T] or [1,T], as a string."""
        tokens = self.to_tokens(input, prepend_bos) if isinstance(input, str) else as_tokens(input)
        tokens = tokens.squeeze(0) if tokens.ndim == 2 else tokens
        if tokens.ndim != 1:
            raise ValueError(f"to_str_tokens takes one sequence [T] or [1,T], found {list(tokens.shape)}")
        return [str(self.to_string(int(token))) for token in tokens]

    def to_single_token(self, string: str) -> int:
        """The id of a string that is one token; ValueError says how it splits if it is not."""
        ids = self._bos(self._need_tokenizer()(string, add_special_tokens=False)["input_ids"], None)
        if len(ids) != 1:
            raise ValueError(f"{string!r} is {len(ids)} tokens, not one: {[self.to_string(i) for i in ids]}")
        return ids[0]

    def to_single_str_token(self, int_token: int) -> str:
        """The string of one token id."""
        return str(self.to_string(int_token))

    def get_token_position(
        self,
        single_token: str | int | Tensor,
        input: str | Tensor,
        mode: Literal["first", "last"] = "first",
        prepend_bos: bool | None = None,
    ) -> int:
        """Where a token (an id, or a string that is one token) stands in a text or in ids [T] or [1,T].

        Raises:
            ValueError: it does not occur there.
        """
        tokens = self.to_tokens(input, prepend_bos) if isinstance(input, str) else input
        wanted = self.to_single_token(single_token) if isinstance(single_token, str) else int(single_token)
        places = (tokens.reshape(-1) == wanted).nonzero().flatten().tolist()
        if not places or (tokens.ndim == 2 and tokens.shape[0] != 1):
            raise ValueError(f"token {single_token!r} is not in one sequence of tokens: found {list(tokens.shape)}")
        return places[0 if mode == "first" else -1]

    def _bos(self, ids: list[int], prepend_bos: bool | None) -> list[int]:
        prepend = self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
        bos = cast("int | None", self._need_tokenizer().bos_token_id)
        if prepend is None:
            return ids
        has = bool(ids) and bos is not None and ids[0] == bos
        if prepend and bos is None:
            raise ValueError("prepend_bos=True, but the tokenizer has no begin-of-sequence token")
        if prepend and not has and bos is not None:
            return [bos, *ids]
        return ids[1:] if has and not prepend else ids

    def _need_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer: pass token ids, or give one to from_hf(model, tokenizer)")
        return self.tokenizer
