"""Tokens as text: exact for the data, and visible for a reader."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hookpoints import HookedRecurrent
from writesae.experiment.tokens import token_text

_SYMBOLS = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽"}
EMPTY = "⟨empty⟩"
"""How a text without characters is shown."""
_LOST = "\ufffd"
_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}


def short(value: float) -> float:
    """Four significant digits, which is what a reader can use and keeps files small."""
    return float(f"{float(value):.4g}")


class TokenTexts:
    """Texts of token ids, decoded once each.

    A token that is only part of a character (byte-level vocabularies have such) decodes to U+FFFD; its bytes are shown
    instead, as `⟨E280⟩`.

    Raises:
        ValueError: the model has no tokenizer, or one with more tokens than the model.
    """

    def __init__(self, model: HookedRecurrent) -> None:
        if model.tokenizer is None:
            raise ValueError(
                "atom pages show text, and this model has no tokenizer: give one to from_hf(model, tokenizer)"
            )
        self._model, self._known = model, dict[int, str]()
        self.size = len(model.tokenizer)
        """Tokens that have a text. A model may have more logits than that, which pad its vocabulary."""
        if self.size > (vocabulary := model.W_U.shape[1]):
            raise ValueError(
                f"the tokenizer has {self.size:,} tokens and the model's vocabulary {vocabulary:,}: it is not this "
                "model's; give the right one to from_hf(model, tokenizer)"
            )

    def check(self, tokens: Tensor) -> None:
        """Raise ValueError for token ids that the tokenizer does not have; names the first."""
        unknown = tokens[(tokens < 0) | (tokens >= self.size)]
        if len(unknown):
            raise ValueError(
                f"the text has token {int(unknown[0])}, and the tokenizer knows 0 to {self.size - 1}: the tokens come "
                "from another tokenizer; make them with model.to_tokens"
            )

    def __call__(self, token: int) -> str:
        """The exact text of a token."""
        if token not in self._known:
            text = token_text(self._model, token)
            self._known[token] = self._bytes(token) or text if _LOST in text else text
        return self._known[token]

    def many(self, tokens: Iterable[int]) -> list[str]:
        """The exact texts of several tokens."""
        return [self(int(token)) for token in tokens]

    def _bytes(self, token: int) -> str | None:
        """`⟨E280⟩` for a token of a byte-level vocabulary, None elsewhere."""
        convert = getattr(self._model.tokenizer, "convert_ids_to_tokens", None)
        written = convert(token) if convert is not None else None
        if not isinstance(written, str) or not set(written) <= _BYTES.keys():
            return None
        return "⟨" + "".join(f"{_BYTES[character]:02X}" for character in written) + "⟩"


def symbol(character: str) -> str | None:
    """What stands for a character without ink: a space, newline, control or format character; None for all others."""
    if unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zs", "Zl", "Zp"):
        return None
    return _SYMBOLS.get(character, f"⟨U+{ord(character):04X}⟩")


def visible(text: str) -> str:
    """`text` with a symbol for everything that leaves no ink."""
    return "".join(symbol(character) or character for character in text) or EMPTY
