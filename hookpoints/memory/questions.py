"""Which tokens a memory still holds, how long heads keep what they write, and which sentence an answer hangs on.

A state is the sum of its tokens' terms, each as the tokens since have left it (`Memory.terms`): a term's size says what
is still held of its token, and needs nothing that was trained.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from hookpoints.errors import InputError

CONTEXT = 3
"""Tokens that are shown before a token."""
SURE = 0.9
"""Probability from which an answer is one that the model is sure of."""
RARE = 5
"""Sentences that may have a word which says what they are about; in long texts half of the sentences."""
_END = re.compile(r"[.!?]['\")\]]*\s*$")
"""How the last token of a sentence ends."""


class HeldToken(NamedTuple):
    """A token, and what a head still holds of it."""

    position: int
    text: str
    """The token."""
    before: str
    """The tokens before it."""
    layer: int
    head: int
    share: float
    """The size of its term, as a share of the sizes of all terms of the head."""


class Keeping(NamedTuple):
    """How long a head keeps what it writes."""

    layer: int
    head: int
    kept: float
    """The share that is left of a write, by size, after `after` tokens: the median over tokens."""
    after: int


class Suspect(NamedTuple):
    """A sentence of a memory, and what an answer is without it."""

    span: tuple[int, int]
    text: str
    answer: str
    """The likeliest next token after the question, without the sentence."""
    probability: float
    """Of that answer."""
    kl: float
    """KL divergence in nats, of the next token: from the memory without the sentence to the memory as it is."""
    contradicts: tuple[int, int] | None
    """The first other sentence that tells `answer`, and shares with this one a word of the question; None where there
    is none, or the answer stays as it is."""
    together: Sequence[tuple[int, int]]
    """The sentences that were left out: this one, and those that tell the same answer of the same thing."""

    @property
    def flagged(self) -> bool:
        """The answer hangs on this sentence, and another one contradicts it: without this one the model is sure of what
        the other tells (`probability` at least `SURE`). A flag is no proof: which of both is true, nothing says."""
        return self.contradicts is not None and self.probability >= SURE

    @property
    def overwrote(self) -> bool:
        """It is flagged, and the sentence that it contradicts was read before it."""
        return self.flagged and self.contradicts is not None and self.contradicts < self.span


def term_sizes(keys: Tensor, values: Tensor) -> Tensor:
    """Norms [B,T,H] of terms: of the matrix sum_r k_r u_r^T, with keys [B,T,H,(R,)K] and values [B,T,H,(R,)V]."""
    if keys.ndim == 4:
        return keys.norm(dim=-1) * values.norm(dim=-1)
    grams = (keys @ keys.mT) * (values @ values.mT)
    return grams.sum((-1, -2)).clamp_min(0).sqrt()


def check_head_number(head: int | None, heads: int, layer: int) -> None:
    """Raise InputError unless this is one of so many heads of a layer, or None; none is counted from the end."""
    if isinstance(head, bool) or (head is not None and head not in range(heads)):
        raise InputError(f"head: expected 0 to {heads - 1} in layer {layer}, got {head!r}")


def largest_terms(sizes: Mapping[int, Tensor], n: int, head: int | None) -> list[tuple[float, int, int, int]]:
    """Share, token, layer and head of the n largest terms, by their sizes [T,H] of each layer; a share is that of all
    terms of the head."""
    if n < 1:
        raise InputError(f"n: expected a number of tokens from 1 on, got {n}")
    terms = list[tuple[float, int, int, int]]()
    for layer, of_layer in sizes.items():
        check_head_number(head, of_layer.shape[1], layer)
        shares = of_layer / of_layer.sum(0).clamp_min(1e-30)
        for of_head in range(of_layer.shape[1]) if head is None else [head]:
            largest = shares[:, of_head].topk(min(n, len(shares)))
            ranked = zip(largest.values.tolist(), largest.indices.tolist(), strict=True)
            terms += [(share, token, layer, of_head) for share, token in ranked]
    return sorted(terms, reverse=True)[:n]


def kept_shares(left: Tensor, written: Tensor, after: int) -> list[float]:
    """By head, what is left of terms [B,T,H] after so many tokens, and up to a quarter more: the median share."""
    last = left.shape[1] - after
    shares = (left / written.clamp_min(1e-30))[:, max(last - 1 - after // 4, 0) : last]
    return shares.flatten(0, 1).median(0).values.tolist()


class Sentences(NamedTuple):
    """The sentences of one text, and which of them are about the same thing."""

    spell: Callable[[Sequence[int]], str]
    """Makes text of token ids."""
    texts: Sequence[str]
    """Of all tokens."""
    tokens: Sequence[int]
    spans: Sequence[tuple[int, int]]
    alike: Sequence[Sequence[int]]
    """By sentence, the numbers of those about the same thing, itself among them."""

    @classmethod
    def of(cls, spell: Callable[[Sequence[int]], str], tokens: Sequence[int], question: Sequence[int]) -> Sentences:
        """Of a text, alike in words that the question has, too.

        Raises:
            InputError: there are fewer than two.
        """
        texts = [spell([token]) for token in tokens]
        spans = sentence_spans(texts)
        if len(spans) < 2:
            raise InputError("memory: expected two sentences at least, which end with . ! or ?, got one")
        asked = words_of([spell([token]) for token in question])
        alike = sentences_alike([words_of(texts[start:stop]) for start, stop in spans], asked)
        return cls(spell, texts, tokens, spans, alike)

    def tells(self, place: int, answer: int) -> bool:
        """Whether a sentence has a token."""
        return answer in self.tokens[slice(*self.spans[place])]

    def telling_together(self, answer: int) -> dict[int, tuple[int, ...]]:
        """By sentence that tells an answer, the sentences that tell it of the same thing, where there are others."""
        groups = [tuple(n for n in about if self.tells(n, answer)) for about in self.alike]
        return {place: group for place, group in enumerate(groups) if place in group and len(group) > 1}

    def suspect(self, place: int, plain: Tensor, without: Tensor, groups: Mapping[int, Sequence[int]]) -> Suspect:
        """What an answer is without a sentence, or without those of its group, from log probabilities [vocab] of the
        next token as it is and ``without``."""
        other = int(without.argmax())
        is_changed = other != int(plain.argmax())
        rivals = [self.spans[n] for n in self.alike[place] if is_changed and n != place and self.tells(n, other)]
        return Suspect(
            self.spans[place],
            text="".join(self.texts[slice(*self.spans[place])]),
            answer=self.spell([other]),
            probability=float(without[other].exp()),
            kl=float(F.kl_div(plain, without, log_target=True, reduction="sum")),
            contradicts=min(rivals, default=None),
            together=[self.spans[n] for n in groups.get(place, [place])],
        )


def sentence_spans(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Spans of sentences, by the tokens that end with `.`, `!` or `?`, of the texts of all tokens."""
    ends = [place + 1 for place, text in enumerate(texts) if _END.search(text)]
    return list(pairwise(dict.fromkeys([0, *ends, len(texts)])))


def words_of(texts: Sequence[str]) -> set[str]:
    """The words, or parts of words, of the texts of tokens, without spaces and capitals."""
    words = {text.strip().lower() for text in texts}
    return {word for word in words if any(map(str.isalnum, word))}


def sentences_alike(sentences: Sequence[set[str]], question: set[str]) -> list[list[int]]:
    """By sentence, the sentences that share with it a word of the question which only few of them have: not `of`."""
    counts = Counter(word for words in sentences for word in words)
    most = max(RARE, len(sentences) // 2)
    topics = [{word for word in words & question if counts[word] <= most} for words in sentences]
    return [[n for n, topic in enumerate(topics) if topic & own] for own in topics]
