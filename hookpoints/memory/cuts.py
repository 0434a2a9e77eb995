"""Memories made of parts: tokens whose factors are stored, and the few that are read again.

A cut leaves out the tokens between two stored stretches, and a paste puts stored tokens of one memory after those of
another. The recurrence runs over stored factors, attention keys turn to their new positions, and what holds the last
few tokens alone (convolutions, token shifts) is made by `TokenReader.read_again`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from operator import index
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache

from hookpoints.errors import InputError
from hookpoints.layer.context import count_tokens
from hookpoints.memory.caches import attends_and_convolves, reach, state_of, turned, window
from hookpoints.recurrence.canonical import tensors
from hookpoints.recurrence.recurrence import Recurrence

if TYPE_CHECKING:
    from hookpoints.memory.passes import Form, Kept, LayerStates, Passed, TokenReader

TokenSpan = slice | tuple[int, int]
"""Tokens start <= t < stop of a memory; negative numbers count from its end."""

_TOGETHER = 2**24
"""Numbers of a factor up to which layers run together: their factors are copied into one tensor."""


class Composed(NamedTuple):
    """What a memory is that was made of parts."""

    cache: Cache
    kept: Kept
    edited: bool


# ------------------------------------------------------------------------------------------------ stretches of tokens


def span_bounds(span: TokenSpan, length: int) -> tuple[int, int]:
    """Start and stop of a span of so many tokens.

    Raises:
        InputError: it is empty or out of range, or no span.
    """
    try:
        tokens = span if isinstance(span, slice) else slice(*span)
        start = 0 if tokens.start is None else index(tokens.start)
        stop = length if tokens.stop is None else index(tokens.stop)
    except TypeError as error:
        raise InputError(f"span: expected a slice or (start, stop) of token numbers, got {span!r}") from error
    # Not `slice.indices`, which moves numbers out of range into it.
    if start < 0:
        start += length
    if stop < 0:
        stop += length
    if tokens.step not in (None, 1) or not 0 <= start < stop <= length:
        raise InputError(f"span: expected start < stop within the {length} tokens read, got {span}")
    return start, stop


def places_of(tokens: Tensor, phrase: Sequence[int]) -> list[tuple[int, int]]:
    """Spans at which every row of tokens [B,T] has a phrase."""
    if not 1 <= len(phrase) <= tokens.shape[1]:
        return []
    windows = tokens.unfold(1, len(phrase), 1)  # [B,N,length]
    is_read = (windows == torch.tensor(phrase, device=windows.device)).all(2).all(0)
    return [(start, start + len(phrase)) for start in is_read.nonzero()[:, 0].tolist()]


def flagged_stretches(flags: Tensor) -> list[str]:
    """Where ``flags`` [B,T] are set in some row, in words."""
    edges = F.pad(flags.any(0).long(), (1, 1)).diff()
    starts = (edges == 1).nonzero().flatten().tolist()
    stops = (edges == -1).nonzero().flatten().tolist()
    return [f"tokens {start} to {stop - 1}" for start, stop in zip(starts, stops, strict=True)]


# ------------------------------------------------------------------------------------------------ stored factors


def stored_recurrence(forms: Mapping[int, Form], kept: Kept, layer: int) -> Recurrence:
    """The recurrence of a layer over stored tokens."""
    _, scale, read_before_write, rates = forms[layer]
    return Recurrence(**kept.factor[layer], scale=scale, read_before_write=read_before_write, rates=rates)


def states_after(forms: Mapping[int, Form], kept: Kept, states: LayerStates | None = None) -> LayerStates:
    """States after what the tokens of ``kept`` wrote, made on ``states`` (None: zeros). Layers of one shape on one
    device are heads of one recurrence, so that a GPU launches its steps once."""
    parts = {layer: stored_recurrence(forms, kept, layer) for layer in forms}
    if states is not None:
        parts = {layer: part.replace(initial_state=states[layer]) for layer, part in parts.items()}
    if not kept.T:
        return {layer: part.starting_state() for layer, part in parts.items()}
    alike: dict[object, list[int]] = {}
    for layer, part in parts.items():
        shapes = tuple((name, x.shape) for name, x in tensors(part))
        alike.setdefault((part.scale, part.read_before_write, part.device, shapes), []).append(layer)
    after: LayerStates = {}
    for layers in alike.values():
        count = max(_TOGETHER // parts[layers[0]].k.numel(), 1)
        for first in range(0, len(layers), count):
            group = layers[first : first + count]
            last = _heads_of([parts[layer] for layer in group]).states(positions=-1)[:, 0]
            after |= zip(group, last.split(parts[layers[0]].H, dim=1))
    return after


def _heads_of(parts: Sequence[Recurrence]) -> Recurrence:
    """Recurrences of one shape as the heads of one."""
    axes = {name: {"initial_state": 1, "rates": 0}.get(name, 2) for name, _ in tensors(parts[0])}
    return parts[0].replace(**{name: torch.cat([getattr(part, name) for part in parts], n) for name, n in axes.items()})


# ------------------------------------------------------------------------------------------------ parts as one memory


def composed(reader: TokenReader, kept: Kept, stop: int, again: Tensor, later: Kept, moved_by: int) -> Composed:
    """The first ``stop`` tokens of ``kept``; then those that are read ``again`` [B,T']; then ``later`` ones, whose
    factors are stored:

        kept      |--- before ---|...           0 <= t < stop, states by the recurrence over stored factors
        again                    |--|           run through the model
        later                       |------|    ``moved_by`` tokens after where they were read

    Args:
        reader: of the memory that ``kept`` belongs to, whose states are those after all of ``kept``.

    Cost: the recurrence over stored factors, and one pass (`TokenReader.read_again`).
    """
    apart = attends_and_convolves(reader.cache)
    # Convolutions of the last tokens depend on what these attend to, which has to be there: first the tokens that are
    # read again, then the stored ones.
    if apart and again.shape[1] and later.T:
        first = composed(reader, kept, stop, again, later.span(0, 0), 0)
        begun = reader._replace(cache=first.cache)
        return composed(begun, first.kept, first.kept.T, again[:, :0], later, moved_by)
    # States before the tokens that are read again.
    before = kept.span(0, stop)
    states = states_after(reader.forms, before)
    if stop == kept.T:
        states = {layer: state_of(reader.cache, layer, form.value_first) for layer, form in reader.forms.items()}
    # Attention keys of later tokens at their new positions.
    moved = later.attention if later.T and moved_by else {}
    backbone = reader.model.attachment.layout.backbone
    keys = {
        place: turned(reader.model.hf_model, backbone, x, moved_by)
        for place, x in moved.items()
        if place.endswith("/keys/")
    }
    placed = later._replace(attention={**later.attention, **keys})
    # The pass. Without tokens to read again the last ones have to attend to all others.
    if apart and not again.shape[1]:
        passed = reader.read_again(before.then(placed), states, again, placed.span(0, 0))
    else:
        passed = reader.read_again(before, states, again, placed)
    placed = _with_unmoved_keys(placed, moved, passed, -min(window(reader.cache), max(later.T, 1)))
    # All of it in one cache.
    joined = before.then(passed.kept, placed)
    reader.store(passed.cache, joined.attention, states_after(reader.forms, placed, passed.states))
    count_tokens(passed.cache, joined.T)
    return Composed(passed.cache, joined, passed.edited)


def _with_unmoved_keys(placed: Kept, moved: Mapping[str, Tensor], passed: Passed, first: int) -> Kept:
    """``placed`` with attention as it was read where the model does not turn its keys as these were turned: that is
    seen at the keys that the pass itself made of the tokens from ``first`` on, counted from the end."""
    for place, x in moved.items():
        made, turned_keys = (keys[place][:, first:].double() for keys in (passed.attention, placed.attention))
        # Wrong positions are off by much more than rounding: half of the digits. NaN is an error.
        if not (made - turned_keys).norm() <= torch.finfo(x.dtype).eps ** 0.5 * turned_keys.norm():
            is_unmoved = {int(place.split("/")[0]): torch.ones_like(placed.inexact)}
            attention = {**placed.attention, place: x}
            placed = placed._replace(attention=attention, unmoved={**placed.unmoved, **is_unmoved})
    return placed


# ------------------------------------------------------------------------------------------------ many cuts at once


def is_inside(cache: Cache, span: tuple[int, int], length: int) -> bool:
    """Whether what convolutions hold of so many tokens is the same with and without a span."""
    return window(cache) <= span[0] and span[1] <= length - window(cache) - reach(cache)


def states_without_each(reader: TokenReader, kept: Kept, spans: Sequence[tuple[int, int]]) -> list[LayerStates]:
    """States [1,H,K,V] without each of ascending spans `is_inside` of one row, where no layer attends: each span as an
    approximate cut leaves it out. One walk over stored factors serves all: it takes up the row of a span where the
    tokens after it were read again."""
    starts, stops = torch.tensor(spans).T[..., None]
    # States before each span, one row a span.
    places = [start - 1 for start, _ in spans]
    states = {layer: stored_recurrence(reader.forms, kept, layer).states(positions=places)[0] for layer in reader.forms}
    # The tokens whose convolution sees the span are read again, all in one pass.
    size = window(reader.cache)
    before = kept.each(lambda name, x: x[0, starts - size + torch.arange(size)])
    again = kept.tokens[0, stops + torch.arange(reach(reader.cache))]
    joining = reader.read_again(before, states, again, before.span(0, 0)).states
    # The stored rest: from where one row joins to where the next does, for all rows that have joined.
    joins = [*(stops[:, 0] + again.shape[1]).tolist(), kept.T]
    states = {layer: x[:0] for layer, x in joining.items()}
    for row, (start, stop) in enumerate(pairwise(joins)):
        states = {layer: torch.cat([x, joining[layer][row : row + 1]]) for layer, x in states.items()}
        states = states_after(reader.forms, kept.span(start, stop, [0] * (row + 1)), states)
    return [{layer: x[row : row + 1] for layer, x in states.items()} for row in range(len(spans))]
