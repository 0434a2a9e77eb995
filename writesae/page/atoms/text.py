"""Tokens as text: exact for the data, and visible for a reader."""

from __future__ import annotations

from collections.abc import Iterable

from hookpoints import HookedRecurrent
from writesae.experiment.tokens import token_text

_SYMBOLS = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽"}
EMPTY = "⟨empty⟩"
"""How a text without characters is shown."""


def short(value: float) -> float:
    """Four significant digits: enough for a reader, and files stay small."""
    return float(f"{float(value):.4g}")


class TokenTexts(dict[int, str]):
    """Exact texts of token ids, decoded once each.

    Raises:
        ValueError: the model has no tokenizer, or one with more tokens than the model.
    """

    def __init__(self, model: HookedRecurrent) -> None:
        n, vocabulary = len(model.tokenizer or ()), model.W_U.shape[1]
        if not 0 < n <= vocabulary:
            raise ValueError(
                f"tokenizer: expected one with 1 to {vocabulary} tokens, got {n}; give the model's own tokenizer to "
                "from_hf(model, tokenizer)"
            )
        self._model, self.size = model, n
        """Tokens that have a text. Further logits of a model pad its vocabulary."""

    def __missing__(self, token: int) -> str:
        self[token] = text = token_text(self._model, token)
        return text

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
