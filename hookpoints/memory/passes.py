"""Passes over tokens of a memory: what of each token is stored, and the short pass that reads some tokens again.

A cut or a paste leaves holes that no stored factor fills: convolutions and token shifts hold the last few tokens alone,
and attention keys have positions. `TokenReader.read_again` runs those few tokens through the model to fill them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from transformers import Cache

from hookpoints.hooks.guard import Hook, HookSpecs
from hookpoints.layer.context import Reading, Recorded, all_left, drop_sources, scope
from hookpoints.memory.caches import attention_of, fill, put_state, state_of, tensors_of, window
from hookpoints.model.inputs import cache_of, continuing
from hookpoints.recurrence.canonical import over_time

if TYPE_CHECKING:
    from hookpoints.model.hooked import HookedModel

LayerStates = dict[int, Tensor]
"""States [B,H,K,V], or differences of states, by recurrent layer."""
Kept = Mapping[str, Tensor]
"""What a memory keeps of each token, [B,T,...]: ``tokens``, ``factor/{layer}/{field}``, ``stream/{hook}``,
``attention/{place in the cache}``; and two kinds of booleans, ``inexact`` (it was read with other tokens in view, or
after one that was) and ``unmoved/{layer}`` (its attention key has an old position)."""


class Form(NamedTuple):
    """What a recurrent layer has besides the factors of its tokens."""

    value_first: bool
    """Whether the cache has its state turned, [B,H,V,K]."""
    scale: float
    read_before_write: bool


class Passed(NamedTuple):
    """What a pass over some tokens left."""

    cache: Cache
    attention: dict[str, Tensor]
    """Keys and values by place, [B,T,H,D], of the tokens of the pass as well."""
    kept: Kept
    """Of the tokens that were read."""
    states: LayerStates
    """After them."""
    edited: bool


class TokenReader(NamedTuple):
    """What reads tokens on from a memory: its model, and a cache of the right kind."""

    model: HookedModel
    cache: Cache
    """Of the memory. It is copied, never changed."""
    forms: Mapping[int, Form]
    """The recurrent layers."""

    def read_again(self, before: Kept, states: LayerStates, again: Tensor, later: Kept) -> Passed:
        """The pass that reads tokens ``again`` [B,T'], after those of ``before`` and their ``states``.

        With them it takes the last tokens of ``before`` and of ``later``, as many as convolutions hold. What blocks
        were given for these is known, and recurrent layers leave them out. So it also leaves the convolutions of the
        last tokens, and shows which keys attention gives them.
        """
        start = before["tokens"].shape[1]
        reread = again.shape[1]
        rest = later["tokens"].shape[1]
        ending = min(window(self.cache), rest)
        # Tokens that are read need a whole window before them; without any, only the last window of all is needed.
        leading = min(window(self.cache) - (0 if reread else ending), start)
        begin = start - leading
        end = start + reread + rest
        place = slice(leading, leading + reread)
        cache = copy.deepcopy(self.cache) if begin else None
        if cache is not None:
            self.store(cache, span_of(before, 0, begin), {})
        entered: dict[str, Tensor] = {}
        first = span_of(before, begin, start)
        last = span_of(later, rest - ending, rest)
        hooks = [
            (name.removeprefix("stream/"), _putting(entered, name, x, place, last[name]))
            for name, x in first.items()
            if name.startswith("stream/")
        ]
        tokens = torch.cat([first["tokens"], again, last["tokens"]], 1)
        # The tokens of `later` in between are left out, but the last ones keep their positions in the whole text.
        positions = torch.tensor([*range(begin, start + reread), *range(end - ending, end)])
        reading = scope(self.model.attachment, reading=Reading(place, states))
        with self.model.recording(None if reread else ()) as recorded, reading:
            cache = run_tokens(self.model, tokens, begin, cache, hooks, positions)
        attention = attention_of(cache, begin + tokens.shape[1])
        if not reread:
            return Passed(cache, attention, span_of(later, 0, 0), states, False)
        after = self.states_of(cache)
        edited = not all_left(recorded, after)
        kept = entered | factors_of(recorded)
        kept["tokens"] = again
        kept["inexact"] = before["inexact"].any(1, keepdim=True).expand(-1, reread)
        kept |= {f"attention/{name}": x[:, start : start + reread] for name, x in attention.items()}
        kept |= {name: torch.zeros_like(again, dtype=torch.bool) for name in before if name.startswith("unmoved/")}
        return Passed(cache, attention, kept, after, edited)

    def store(self, cache: Cache, kept: Kept, states: Mapping[int, Tensor]) -> None:
        """Put attention's keys and values, and states, into ``cache``."""
        fill(cache, {place: x.transpose(1, 2) for place, x in by_place(kept, "attention/").items()})
        for layer, state in states.items():
            put_state(cache, layer, state, self.forms[layer].value_first)
        drop_sources(cache)

    def states_of(self, cache: Cache) -> LayerStates:
        """Views of the states in a cache."""
        return {layer: state_of(cache, layer, form.value_first) for layer, form in self.forms.items()}


def run_tokens(
    model: HookedModel,
    tokens: Tensor,
    position: int,
    cache: Cache | None,
    hooks: HookSpecs = (),
    positions: Tensor | None = None,
) -> Cache:
    """The cache after a pass over ``tokens`` [B,T], the first of which stands at ``position``, from ``cache`` on.
    ``positions`` [T]: of all tokens, where they do not follow one another."""
    inputs = continuing(model.hf_model, cache, position, tokens)
    if positions is not None and "position_ids" in inputs:
        inputs["position_ids"] = positions.to(tokens.device).expand_as(tokens)
    with torch.no_grad(), scope(model.attachment, first_token=position), model.hooks(hooks):
        return cache_of(model.hf_model(input_ids=tokens, logits_to_keep=1, **inputs))


def recorded_streams(model: HookedModel) -> list[str]:
    """Hooks that tell what blocks were given, and what mixers added to it."""
    names: list[str] = []
    for layer, block in enumerate(model.attachment.layout.blocks):
        names.append(f"blocks.{layer}.hook_resid_pre")
        if block.mixer_out is not None:
            names.append(f"blocks.{layer}.hook_mixer_out")
    return names


def is_stored(stream: str, cache: Cache) -> bool:
    """Whether what a block keeps of its past is made of this stream: its input, or, where it has a second token shift
    (RWKV's channel mix), what its mixer adds to that."""
    layer = stream.split(".")[1]
    places = [place for place in tensors_of(cache) if place.startswith(f"{layer}/")]
    if stream.endswith("hook_mixer_out"):
        return f"{layer}/conv_states/1" in places
    return bool(places)


def by_place(tensors: Kept, kind: str) -> dict[str, Tensor]:
    return {name.removeprefix(kind): x for name, x in tensors.items() if name.startswith(kind)}


def span_of(kept: Kept, start: int, stop: int) -> dict[str, Tensor]:
    return {name: x[:, start:stop] for name, x in kept.items()}


def concatenated(*parts: Kept) -> dict[str, Tensor]:
    """Stretches of tokens one after the other; those without tokens are left out."""
    some = [part for part in parts if part["tokens"].shape[1]]
    if len(some) == 1:
        return dict(some[0])
    return {name: torch.cat([part[name] for part in some], 1) for name in some[-1]}


def put_last(kept: dict[str, Tensor], name: str, x: Tensor) -> None:
    """Replace what a memory keeps of the last tokens."""
    kept[name] = torch.cat([kept[name][:, : -x.shape[1]], x], 1)


def factors_of(recorded: Mapping[int, Recorded]) -> dict[str, Tensor]:
    """What `Kept` names factors, of a recorded pass."""
    layers = recorded.items()
    return {f"factor/{layer}/{name}": x for layer, record in layers for name, x in over_time(record.recurrence)}


def _putting(entered: dict[str, Tensor], name: str, before: Tensor, place: slice, after: Tensor) -> Hook:
    """A hook that gives a block what it was given ``before`` the tokens at ``place`` and ``after`` them; notes what it
    is given at these."""

    def put(value: Tensor, hook: object) -> Tensor:
        entered[name] = value[:, place]
        return torch.cat([before, entered[name], after], 1)

    return put
