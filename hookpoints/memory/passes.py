"""Passes over tokens of a memory: what of each token is stored, and the short pass that reads some tokens again.

A cut or a paste leaves holes that no stored factor fills: convolutions and token shifts hold the last few tokens alone,
and attention keys have positions. `TokenReader.read_again` runs those few tokens through the model to fill them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache

from hookpoints.hooks.guard import Hook, HookSpecs
from hookpoints.layer.context import Recorded, all_left, drop_sources, scope
from hookpoints.memory.caches import attention_of, chosen_rows, fill, put_state, state_of, tensors_of, window
from hookpoints.model.inputs import as_tokens, cache_of, check_tokens, continuing
from hookpoints.recurrence.canonical import over_time

if TYPE_CHECKING:
    from hookpoints.layer.call import LayerCall
    from hookpoints.model.hooked import HookedModel
    from hookpoints.model.tokens import Tokens
    from hookpoints.recurrence.recurrence import Recurrence
    from hookpoints.rules.base import OpResult

LayerStates = dict[int, Tensor]
"""States [B,H,K,V], or differences of states, by recurrent layer."""


class Kept(NamedTuple):
    """What a memory keeps of tokens that follow one another. Every tensor is [B,T,...]; a file names them by field."""

    tokens: Tensor
    inexact: Tensor
    """[B,T] bool: the token was read with other tokens in view, or after one that was."""
    factor: Mapping[int, Mapping[str, Tensor]]
    """The recurrence, by layer and field."""
    stream: Mapping[str, Tensor]
    """What blocks were given, by hook."""
    attention: Mapping[str, Tensor]
    """Keys and values by place in the cache, [B,T,H,D]."""
    unmoved: Mapping[int, Tensor]
    """[B,T] bool, by attention layer: the token's key has an old position."""

    @property
    def T(self) -> int:
        """Number of tokens."""
        return self.tokens.shape[1]

    @property
    def filed(self) -> Kept:
        """What a file holds: all but attention, which the cache has, too."""
        return self._replace(attention={})

    def each(self, change: Callable[[str, Tensor], Tensor]) -> Kept:
        """With what ``change`` makes of each tensor, given its name: ``tokens``, ``factor/{layer}/{field}``,
        ``stream/{hook}`` ..."""
        return Kept(*(_changed_field(name, field, change) for name, field in zip(self._fields, self)))

    def named(self) -> dict[str, Tensor]:
        """All tensors by name."""
        named: dict[str, Tensor] = {}
        self.each(named.setdefault)
        return named

    def span(self, start: int, stop: int, rows: slice | list[int] = slice(None)) -> Kept:
        """What it keeps of tokens start <= t < stop: views, or copies of ``rows``, in their order."""
        return self.each(lambda name, x: x[rows, start:stop])

    def then(self, *others: Kept) -> Kept:
        """Stretches of tokens one after the other; those without tokens are left out. It has the names of the last."""
        some = [part for part in (self, *others) if part.T]
        if len(some) == 1:
            return some[0]
        named = [part.named() for part in some]
        return some[-1].each(lambda name, x: torch.cat([part[name] for part in named], 1))


class Form(NamedTuple):
    """What a recurrent layer has besides the factors of its tokens."""

    value_first: bool
    """Whether the cache has its state turned, [B,H,V,K]."""
    scale: float
    read_before_write: bool
    rates: Tensor | None = None
    """[H,K,V], where each entry of the state has its own decay (Mamba-1)."""


class Passed(NamedTuple):
    """What a pass over some tokens left."""

    cache: Cache
    attention: Mapping[str, Tensor]
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
        start = before.T
        reread = again.shape[1]
        ending = min(window(self.cache), later.T)
        # Tokens that are read need a whole window before them; without any, only the last window of all is needed.
        leading = min(window(self.cache) - (0 if reread else ending), start)
        begin = start - leading
        end = start + reread + later.T
        place = slice(leading, leading + reread)
        cache = chosen_rows(self.cache, torch.arange(len(again))) if begin else None
        if cache is not None:
            self.store(cache, before.span(0, begin).attention, {})
        entered: dict[str, Tensor] = {}
        first = before.span(begin, start)
        last = later.span(later.T - ending, later.T)
        hooks = [(name, _hook_of_block(entered, name, x, place, last.stream[name])) for name, x in first.stream.items()]
        tokens = torch.cat([first.tokens, again, last.tokens], 1)
        # The tokens of `later` in between are left out, but the last ones keep their positions in the whole text.
        positions = torch.tensor([*range(begin, start + reread), *range(end - ending, end)])
        part = partial(_result_of_part, place, start, states)
        partly = scope(self.model.attachment, part=part, backend="recurrence")
        with self.model.recording(None if reread else ()) as recorded, partly:
            cache = run_tokens(self.model, tokens, begin, cache, hooks, positions)
        attention = attention_of(cache, begin + tokens.shape[1])
        if not reread:
            return Passed(cache, attention, later.span(0, 0), states, False)
        after = {layer: state_of(cache, layer, form.value_first) for layer, form in self.forms.items()}
        kept = Kept(
            tokens=again,
            inexact=before.inexact.any(1, keepdim=True).expand(-1, reread),
            factor=factors_of(recorded),
            stream=entered,
            attention={name: x[:, start : start + reread] for name, x in attention.items()},
            unmoved={layer: torch.zeros_like(again, dtype=torch.bool) for layer in before.unmoved},
        )
        return Passed(cache, attention, kept, after, not all_left(recorded, after))

    def store(self, cache: Cache, attention: Mapping[str, Tensor], states: Mapping[int, Tensor]) -> None:
        """Put attention's keys and values, and states, into ``cache``."""
        fill(cache, {place: x.transpose(1, 2) for place, x in attention.items()})
        for layer, state in states.items():
            put_state(cache, layer, state, self.forms[layer].value_first)
        drop_sources(cache)


def _result_of_part(
    place: slice, start: int, states: LayerStates, call: LayerCall, recurrence: Recurrence, *args: Any
) -> OpResult:
    """What a layer's call returns that runs the tokens at a ``place`` of the pass alone, from states [B,H,K,V] before
    their first, which stands at ``start``. The other tokens go through convolutions and read zeros."""
    call.first_token = start
    part = recurrence.select(tokens=place, initial_state=states[call.mixer.layer])
    result = call.result(part, *args)
    return result._replace(outputs=F.pad(result.outputs, (0, 0, 0, 0, place.start, recurrence.T - place.stop)))


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


@torch.no_grad()
def read_on(model: HookedModel, tokens: Tensor, position: int, cache: Cache | None) -> tuple[Cache, Tensor]:
    """The cache after ``tokens`` [N,T], few of them, from ``cache`` on, which is used up; and log probabilities
    [N,vocab] of the next token."""
    backend = "recurrence" if tokens.device.type == "cpu" else None  # upstream's ops pad short texts to their chunk
    with scope(model.attachment, first_token=position, backend=backend):
        inputs = continuing(model.hf_model, cache, position, tokens)
        output = model.hf_model(input_ids=tokens, logits_to_keep=1, **inputs)
    return cache_of(output), output.logits[:, -1].float().log_softmax(-1)


def token_list(model: Tokens, phrase: str | Sequence[int] | Tensor) -> list[int]:
    """Token ids of a phrase, without a first token (bos).

    Raises:
        InputError: no ids [T] of the vocabulary.
    """
    if isinstance(phrase, str):
        return model.to_tokens(phrase, prepend_bos=False, truncate=False)[0].tolist() if phrase else []
    tokens = as_tokens(phrase)[None]
    check_tokens(tokens, model.cfg)
    return tokens[0].tolist()


def spelled(model: Tokens, tokens: Sequence[int]) -> str:
    """The text of tokens; their ids, where the model has no tokenizer."""
    has_text = model.tokenizer is not None and len(tokens) > 0
    return str(model.to_string(list(tokens))) if has_text else " ".join(map(str, tokens))


def recorded_streams(model: HookedModel) -> list[str]:
    """Hooks that tell what blocks were given, and what mixers added to it."""
    names: list[str] = []
    for layer, block in enumerate(model.attachment.layout.blocks):
        names.append(f"blocks.{layer}.hook_resid_pre")
        if block.mixer_out is not None:
            names.append(f"blocks.{layer}.hook_mixer_out")
    return [name for name in names if name in model.hook_dict]  # blocks of several streams are given no single one


def is_stored(stream: str, cache: Cache) -> bool:
    """Whether what a block keeps of its past is made of this stream: its input, or, where it has a second token shift
    (RWKV's channel mix), what its mixer adds to that."""
    layer = stream.split(".")[1]
    places = [place for place in tensors_of(cache) if place.startswith(f"{layer}/")]
    if stream.endswith("hook_mixer_out"):
        return f"{layer}/conv_states/1" in places
    return bool(places)


def factors_of(recorded: Mapping[int, Recorded]) -> dict[int, dict[str, Tensor]]:
    """What `Kept` names factors, of a recorded pass."""
    return {layer: dict(over_time(record.recurrence)) for layer, record in recorded.items()}


def _changed_field(name: str, field: Any, change: Callable[[str, Tensor], Tensor]) -> Any:
    """What `Kept.each` makes of a field: of a tensor, or of those that mappings hold."""
    if isinstance(field, Tensor):
        return change(name, field)
    return {key: _changed_field(f"{name}/{key}", x, change) for key, x in field.items()}


def _hook_of_block(entered: dict[str, Tensor], name: str, before: Tensor, place: slice, after: Tensor) -> Hook:
    """A hook that gives a block what it was given ``before`` the tokens at ``place`` and ``after`` them; notes what it
    is given at these."""

    def put(value: Tensor, hook: object) -> Tensor:
        entered[name] = value[:, place]
        return torch.cat([before, entered[name], after], 1)

    return put
