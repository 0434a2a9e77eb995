"""Tasks whose mechanism is known as a circuit: induction, which one layer alone cannot do, and parity, which a memory
that only decays cannot keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from hookpoints.zoo.tasks import Batch


@dataclass(frozen=True)
class Induction:
    """Different words, then the same words once more: ``<bos> w4 w19 w2 w4 w19 w2``. After a word, the second time, its
    follower is asked for."""

    n_words: int = 32
    sizes: tuple[Mapping[str, int], ...] = tuple({"words": words} for words in range(6, 17))

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """``<bos>``, ``w0`` to ``w31``."""
        return ("<bos>", *(f"w{i}" for i in range(self.n_words)))

    def batch(self, n: int, generator: Generator, words: int = 12, queries: int = 1) -> Batch:
        """n fresh sequences of 1 + 2 words tokens. Symbols: values [B,P], the words; asked [B,Q], never the first."""
        values = torch.rand(n, self.n_words, generator=generator).argsort(dim=1)[:, :words]
        return self.spell({"values": values, "asked": torch.randint(1, words, (n, queries), generator=generator)})

    def spell(self, symbols: Mapping[str, Tensor]) -> Batch:
        """The sequences that values [B,P] and asked [B,Q] spell. The key of a word is the one before it."""
        words = 1 + symbols["values"]
        asked = symbols["asked"]
        tokens = torch.cat([0 * words[:, :1], words, words], dim=1)
        places = torch.arange(words.shape[1]).expand_as(words)
        return Batch(
            tokens=tokens,
            positions=words.shape[1] + asked,
            answers=words.gather(1, asked),
            symbols=symbols,
            places={"keys": places, "values": places + 1},
        )

    def others(self, values: Tensor, generator: Generator) -> Tensor:
        """For each word another one."""
        return (values + torch.randint(1, self.n_words, values.shape, generator=generator)) % self.n_words


@dataclass(frozen=True)
class Parity:
    """Bits: ``<bos> 1 0 1 1``. After each bit it is asked whether the ones so far are ``even`` or ``odd``; the answers
    are not in the sequence."""

    sizes: tuple[Mapping[str, int], ...] = tuple({"bits": bits} for bits in range(2, 41))

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """``<bos>``, ``0``, ``1``, ``even``, ``odd``."""
        return ("<bos>", "0", "1", "even", "odd")

    def batch(self, n: int, generator: Generator, bits: int = 40, queries: int = 1) -> Batch:
        """n fresh sequences of 1 + bits tokens. Symbols: values [B,P], the bits; asked [B,Q]: one question is about the
        last bit, more are about any."""
        asked = torch.randint(bits, (n, queries), generator=generator)
        asked[:, 0] = bits - 1
        return self.spell({"values": torch.randint(2, (n, bits), generator=generator), "asked": asked})

    def spell(self, symbols: Mapping[str, Tensor]) -> Batch:
        """The sequences that values [B,P] spell."""
        values = symbols["values"]
        asked = symbols["asked"]
        answers = 3 + (values.cumsum(dim=1) % 2).gather(1, asked)
        tokens = torch.cat([values.new_zeros(len(values), 1), 1 + values], dim=1)
        places = 1 + torch.arange(values.shape[1]).expand_as(values)
        return Batch(tokens, 1 + asked, answers, symbols, {"values": places})

    def others(self, values: Tensor, generator: Generator) -> Tensor:
        """The other bit."""
        return 1 - values
