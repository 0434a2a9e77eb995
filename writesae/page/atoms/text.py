"""Tokens as text: exact for the data, and visible for a reader."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from hookpoints import HookedRecurrent
from writesae.experiment.tokens import token_text

_SYMBOLS = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽"}
EMPTY = "⟨empty⟩"
"""How a text without characters is shown."""


def short(value: float) -> float:
    """Four significant digits: enough for a reader, and files stay small."""
    return float(f"{float(value):.4g}")


def token_bytes(tokenizer: Any, token: int) -> bytes | None:
    """The bytes of a token of a byte-level vocabulary, or of a byte of another one (<0xE2>); None for all others."""
    piece = tokenizer.convert_ids_to_tokens(token) if hasattr(tokenizer, "convert_ids_to_tokens") else None
    if not isinstance(piece, str):
        return None
    if match := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
        return bytes.fromhex(match[1])
    table = {character: byte for byte, character in bytes_to_unicode().items()}
    return bytes(table[character] for character in piece) if table.keys() >= {*piece} else None


class TokenTexts(dict[int, str]):
    """Exact texts of token ids, decoded once each. Bytes that are no text, as a part of a character, are hexadecimal
    digits in angle brackets.

    Raises:
        ValueError: the model has no tokenizer, or one with more tokens than the model.
    """

    def __init__(self, model: HookedRecurrent) -> None:
        n = len(model.tokenizer or ())
        vocabulary = model.W_U.shape[1]
        if not 0 < n <= vocabulary:
            raise ValueError(
                f"tokenizer: expected one with 1 to {vocabulary} tokens, got {n}; give the model's own tokenizer to "
                "from_hf(model, tokenizer)"
            )
        self._model, self.size = model, n
        """Tokens that have a text. Further logits of a model pad its vocabulary."""

    def __missing__(self, token: int) -> str:
        raw = token_bytes(self._model.tokenizer, token) or b""
        try:
            raw.decode()
        except UnicodeDecodeError:
            self[token] = f"⟨{raw.hex(' ').upper()}⟩"
        else:
            self[token] = token_text(self._model, token)
        return self[token]

    def many(self, tokens: Iterable[int]) -> list[str]:
        """The exact texts of several tokens."""
        return [self[int(token)] for token in tokens]


def symbol(character: str) -> str | None:
    """The symbol of a character without ink: a space, newline, control or format character; None for all others."""
    has_ink = character.isprintable() and character != " "
    return None if has_ink else _SYMBOLS.get(character, f"⟨U+{ord(character):04X}⟩")


def visible(text: str) -> str:
    """`text` with a symbol for everything that leaves no ink."""
    return "".join(symbol(character) or character for character in text) or EMPTY
