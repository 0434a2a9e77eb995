"""Phrases that a model proposes, with what it carries forward after each: for a beam.

Phrases that share their first tokens share the pass over them: each step reads one token of each phrase from a copy of
its parent's cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from transformers import Cache

from hookpoints.memory.caches import chosen_rows, state_of
from hookpoints.memory.passes import Form, LayerStates, read_on

if TYPE_CHECKING:
    from hookpoints.model.hooked import HookedModel


class Phrases(NamedTuple):
    """N phrases of one length, after what was read before them."""

    model: HookedModel
    tokens: Tensor
    """[N,L], without those before the phrase."""
    position: int
    """Where the next token stands."""
    cache: Cache
    log_probs: Tensor
    """[N,vocab], of the next token."""

    @classmethod
    def start(cls, model: HookedModel, before: Tensor, cache: Cache | None = None, position: int = 0) -> Phrases:
        """No tokens yet, after ``before`` [N,T], read from ``cache`` on."""
        after, log_probs = read_on(model, before, position, cache)
        return cls(model, before[:, :0], position + before.shape[1], after, log_probs)

    def then(self, rows: Tensor, tokens: Tensor) -> Phrases:
        """Phrases ``rows`` [N'], each with one of ``tokens`` [N'] more."""
        cache, log_probs = read_on(self.model, tokens[:, None], self.position, chosen_rows(self.cache, rows))
        longer = torch.cat([self.tokens[rows], tokens[:, None]], 1)
        return Phrases(self.model, longer, self.position + 1, cache, log_probs)

    def states(self, forms: Mapping[int, Form]) -> LayerStates:
        """[N,H,K,V] after each phrase; views."""
        return {layer: state_of(self.cache, layer, form.value_first).float() for layer, form in forms.items()}


def runs(phrase: Sequence[int], length: int) -> set[tuple[int, ...]]:
    """Every ``length`` tokens in a row of a phrase; of a shorter one, all of it."""
    return {tuple(phrase[n : n + length]) for n in range(max(len(phrase) - length + 1, 1))}
