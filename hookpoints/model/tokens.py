"""Text in and out of a hooked model."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast, overload

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hookpoints.errors import InputError, nearest
from hookpoints.model.hooked import HookedModel
from hookpoints.model.inputs import as_tokens

PaddingSide = Literal["left", "right"]


class TokenBatch(NamedTuple):
    """Tokens and which of them are real."""

    tokens: Tensor
    """[B,T] integer ids."""
    attention_mask: Tensor | None
    """[B,T], 1 for real tokens; None where nothing is padded."""


class Tokens(HookedModel):
    """A hooked model with a tokenizer."""

    tokenizer: PreTrainedTokenizerBase | None

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

        Raises:
            InputError: no text, or a word that a tokenizer of whole words lacks; names the nearest.
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
        texts = [input] if isinstance(input, str) else list(input) if isinstance(input, list | tuple) else []
        if not texts or not all(isinstance(text, str) for text in texts):
            raise InputError(f"text must be a string or a list of strings, got {input!r:.80}")
        rows = [self._with_bos(self._text_ids(text), prepend_bos) for text in texts]
        if truncate:
            rows = [row[: self.cfg.n_ctx] for row in rows]
        width = max(map(len, rows))
        side = padding_side or tokenizer.padding_side
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad is None and any(len(row) < width for row in rows):
            raise ValueError("texts of unequal length need padding, but the tokenizer has no pad or eos token")
        # By hand: the tokenizer's own padding needs a pad token, which some lack.
        tokens = torch.full((len(rows), width), cast(int, pad or 0))
        mask = torch.zeros_like(tokens)
        for n, row in enumerate(rows):
            place = slice(width - len(row), None) if side == "left" else slice(len(row))
            tokens[n, place] = torch.tensor(row)
            mask[n, place] = 1
        device = self.cfg.device if move_to_device else "cpu"
        return TokenBatch(tokens.to(device), None if bool(mask.all()) else mask.to(device))

    def to_string(self, tokens: Tensor | list[int] | int) -> str | list[str]:
        """Text of tokens: one string for [T], a list for [B,T]. Special tokens are included."""
        tokenizer = self._need_tokenizer()
        tokens = as_tokens(tokens)
        if tokens.ndim == 2:
            return [str(tokenizer.decode(row, clean_up_tokenization_spaces=False)) for row in tokens.tolist()]
        return str(tokenizer.decode(tokens.reshape(-1).tolist(), clean_up_tokenization_spaces=False))

    @overload
    def to_str_tokens(self, input: str | Tensor | list[int], prepend_bos: bool | None = None) -> list[str]: ...
    @overload
    def to_str_tokens(self, input: list[str], prepend_bos: bool | None = None) -> list[list[str]]: ...
    def to_str_tokens(
        self, input: str | Tensor | list[int] | list[str], prepend_bos: bool | None = None
    ) -> list[str] | list[list[str]]:
        """Each token of one text, or of ids [T] or [1,T], as a string; for a list of texts a list for each."""
        if isinstance(input, list) and input and isinstance(input[0], str):
            return [self.to_str_tokens(cast(str, text), prepend_bos) for text in input]
        tokens = self.to_tokens(input, prepend_bos) if isinstance(input, str) else as_tokens(input)
        tokens = tokens.squeeze(0) if tokens.ndim == 2 else tokens
        if tokens.ndim != 1:
            raise ValueError(f"to_str_tokens takes one sequence [T] or [1,T], got {list(tokens.shape)}")
        return [str(self.to_string(int(token))) for token in tokens]

    def to_single_token(self, string: str) -> int:
        """The id of a string that is one token; ValueError says how it splits if it is not, or that it is none."""
        ids = self._with_bos(self._text_ids(string, add_special_tokens=False), None)
        if len(ids) != 1:
            raise ValueError(f"{string!r} is {len(ids)} tokens, not one: {[self.to_string(i) for i in ids]}")
        return ids[0]

    def _text_ids(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text, or InputError for a word that a tokenizer of whole words lacks."""
        tokenizer = self._need_tokenizer()
        try:
            return tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        except Exception as error:  # the tokenizers library raises no narrower one
            words = tokenizer.get_vocab()
            split = cast(Any, tokenizer).backend_tokenizer.pre_tokenizer.pre_tokenize_str
            word_parts = [part for word in text.split() if word not in words for part, _ in split(word)]
            for word in [part for part in word_parts if part not in words]:
                some = nearest(word, words) or f"; it has {', '.join(sorted(words)[:5])} ..."
                raise InputError(f"text: {self.cfg.model_name} has no word {word!r}{some}") from error
            raise

    def _with_bos(self, ids: list[int], prepend_bos: bool | None) -> list[int]:
        prepend = self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
        bos = cast("int | None", self._need_tokenizer().bos_token_id)
        if prepend is None:
            return ids
        if prepend and bos is None:
            raise ValueError("prepend_bos=True, but the tokenizer has no begin-of-sequence token")
        without = ids[1:] if ids[:1] == [bos] else ids
        return [cast(int, bos), *without] if prepend else without

    def _need_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer: pass token ids, or give one to from_hf(model, tokenizer)")
        return self.tokenizer
