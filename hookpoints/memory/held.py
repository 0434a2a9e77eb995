"""Which tokens a memory still holds, how long heads keep what they write, and which sentence an answer hangs on.

A state is the sum of its tokens' terms, each as the tokens since have left it (`Memory.terms`): a term's size says what
is still held of its token, and needs nothing that was trained.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from hookpoints.errors import InputError

if TYPE_CHECKING:
    from hookpoints.memory.passes import LayerStates

CONTEXT = 3
"""Tokens that are shown before a token."""
SURE = 0.8
"""Probability from which an answer is one that the model is sure of."""
HELD = 0.03
"""Share of a sentence from which a memory holds it."""
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
    held: float
    """How much of the sentence with that answer the memory without the sentence holds, by `held_share`: 1 if nothing
    but it had been read. NaN where the answer stays as it is, or the sentence does not say it."""
    flagged: bool
    """The sentence overwrote that answer: the model is sure of it (`probability` at least `SURE`), and the memory holds
    it (`held` at least `HELD`). A flag is no proof. Without the only sentence that told an answer a model may be sure
    of a wrong one, but its memory rarely holds it."""


def head_shares(states: Tensor, change: Tensor) -> Tensor:
    """[B,H,1,1]: how much of a change [1,H,K,V] the states [B,H,K,V] of each head hold already, from 0 to 1, by least
    squares."""
    sizes = change.square().sum((2, 3), keepdim=True)
    return ((states * change).sum((2, 3), keepdim=True) / sizes.clamp_min(1e-30)).clamp(0, 1)


def held_share(states: LayerStates, change: LayerStates) -> float:
    """How much of a change [1,H,K,V] of states [1,H,K,V] they hold already, by least squares over all heads."""
    held = sum(float((states[layer] * x).sum()) for layer, x in change.items())
    return held / max(sum(float(x.square().sum()) for x in change.values()), 1e-30)


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
    found = list[tuple[float, int, int, int]]()
    for layer, of_layer in sizes.items():
        check_head_number(head, of_layer.shape[1], layer)
        shares = of_layer / of_layer.sum(0).clamp_min(1e-30)
        for of_head in range(of_layer.shape[1]) if head is None else [head]:
            largest = shares[:, of_head].topk(min(n, len(shares)))
            ranked = zip(largest.values.tolist(), largest.indices.tolist(), strict=True)
            found += [(share, token, layer, of_head) for share, token in ranked]
    return sorted(found, reverse=True)[:n]


def kept_shares(left: Tensor, written: Tensor, after: int) -> list[float]:
    """By head, what is left of terms [B,T,H] after so many tokens, and up to a quarter more: the median share."""
    last = left.shape[1] - after
    shares = (left / written.clamp_min(1e-30))[:, max(last - 1 - after // 4, 0) : last]
    return shares.flatten(0, 1).median(0).values.tolist()


def sentence_spans(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Spans of sentences, by the tokens that end with `.`, `!` or `?`, of the texts of all tokens."""
    ends = [place + 1 for place, text in enumerate(texts) if _END.search(text)]
    return list(pairwise(dict.fromkeys([0, *ends, len(texts)])))
