"""A hooked recurrent layer, and one forward of it: what happens between an upstream layer and its op."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hookpoints.edits.edit import LowRankChange, changes_of
from hookpoints.errors import UnsupportedModelError
from hookpoints.hooks.points import HookSet, MixerHooks, watch
from hookpoints.layer.context import (
    Backend,
    Recorded,
    Sources,
    cache_among,
    count_tokens,
    current,
    keep_sources,
    sources_of,
)
from hookpoints.layer.intercept import Function, open_handlers, running, torch_form, wrap_forward
from hookpoints.layer.padding import UNPADDED, Padding
from hookpoints.layer.response import EditResponse
from hookpoints.recurrence.recurrence import Recurrence, pattern_of
from hookpoints.rules.base import Arguments, OpResult, Rule


class HookedMixer:
    """What is known of one recurrent layer. It holds nothing of a call (see ``LayerCall``), so threads share it.

    Args:
        owner: the attachment; runs of other hooked models do not concern this one.
        layer: block index.
        projection: the layer's own, which takes what the heads hand on.
        backend: who computes the native pass.
        in_torch: whether upstream's ops are torch functions here.

    Raises:
        UnsupportedModelError: the layer calls the rule's op but does not name its sizes as the rule's layers do.
    """

    def __init__(
        self,
        owner: object,
        layer: int,
        rule: Rule,
        module: nn.Module,
        projection: nn.Module,
        backend: Backend,
        in_torch: bool = False,
    ):
        try:
            heads, _, _ = rule.head_shape(module)
        except AttributeError as error:
            raise UnsupportedModelError(
                f"{type(module).__name__} (layer {layer}) calls {rule.ops[0]}, but does not name its sizes as layers "
                f"of {rule.name} do: {error}"
            ) from error
        self.owner, self.layer, self.rule, self.module = owner, layer, rule, module
        self.heads, self.projection = heads, projection
        self.backend: Backend = backend
        self.runs_alone = in_torch and backend == "auto" and not rule.kernel_only
        """Whether the layer needs nothing of this package to run."""
        self.hooks = MixerHooks(heads, rule.hook_factors)
        self.calls = 0
        """Op calls so far; the self-check reads it."""

    def needed(self) -> bool:
        """Whether a forward of the layer has to be handled: a hook, an edit or a recording is active, or it does not
        run alone. Inside a forward that is handled it always has, so that its ops do not go to that one's handler."""
        asked = not self.runs_alone or self.hooks.listeners.exist() or current(self.owner).asks_layers
        return asked or bool(open_handlers())


def hook_layer(mixer: HookedMixer, counts: bool) -> Callable[[], None]:
    """Make a ``LayerCall`` of every forward of the mixer's layer in which it is needed, or of each one if the layer
    ``counts`` the tokens of a cache (in partial runs all do); returns what undoes it."""

    def around(forward: Function, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        call = LayerCall(mixer, args, kwargs)
        return running(call, forward, args, kwargs) if mixer.needed() else forward(*args, **kwargs)

    return wrap_forward(mixer.module, around, None if counts else mixer.needed)


def hook_projection(mixer: HookedMixer) -> Callable[[], None]:
    """Fire ``hook_z`` on what the layer gives its output projection; returns what undoes it."""

    def around(forward: Function, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        calls = (call for call in open_handlers() if isinstance(call, LayerCall) and call.mixer is mixer)
        if mixer.hooks.listens("hook_z") and (call := next(calls, None)) is not None:
            args = (call.fire_z(cast(Tensor, args[0])), *args[1:])
        return forward(*args, **kwargs)

    return wrap_forward(mixer.projection, around, mixer.hooks.listeners.exist)


class LayerCall:
    """One forward of a layer. It handles the op calls made meanwhile, and dies with the forward however that ends.

    With no listener, no edit and backend "auto" it calls the op with the very arguments it was given.

    Args:
        mixer: the layer.
        args, kwargs: what the layer was called with.
    """

    def __init__(self, mixer: HookedMixer, args: tuple[object, ...], kwargs: dict[str, object]):
        self.mixer, self.module, self.hooks = mixer, mixer.module, mixer.hooks
        self.run = current(mixer.owner)
        self.open = True
        self.padding = UNPADDED
        """Of the op call."""
        self.cache = cache = cache_among(*args, *kwargs.values())
        hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        self.first_token = self.run.position if self.run.in_pass or cache is not None else 0
        """Position of the first token; None where nothing tells."""
        if cache is not None and self.first_token is not None:
            count_tokens(cache, self.first_token + hidden.shape[1])
        mask = kwargs.get("attention_mask")
        self.real: Tensor | None = None
        """[B,T] bool, which tokens are real, where the layer is told so in that form."""
        if isinstance(mask, Tensor) and mask.ndim == 2:
            self.real = mask[:, -hidden.shape[1] :] != 0

    @property
    def projection(self) -> nn.Module | None:
        """The layer's output projection, where its input has a hook."""
        return self.mixer.projection if self.hooks.listens("hook_z") else None

    def handle(self, op: Function, arguments: Arguments) -> object:
        """Run the op with hooks and edits around it; returns what the layer expects from the op."""
        rule, run = self.mixer.rule, self.run
        self.mixer.calls += 1
        backend = run.backend or self.mixer.backend
        native_op = torch_form(op) if backend == "torch" else op
        if backend == "recurrence" or not rule.runs(op, arguments):
            native_op = None  # hookpoints' own kernel computes the pass
        edited = any(self.mixer.layer in plan.by_layer for plan in run.plans)
        record = run.record if run.recorded is None or self.mixer.layer in run.recorded else None
        if not edited and record is None and native_op is not None and not self.hooks.listeners.exist():
            return native_op(**arguments)
        # fla's layers take the padding out before the op.
        padding = self.padding = Padding(self.real) if arguments.get("cu_seqlens") is not None else UNPADDED
        factors = rule.factors(arguments).over_time(padding.spread)
        fired = {name: self._fire_copy(f"hook_{name}", getattr(factors, name)) for name in factors.NAMES}
        changes = {name: factor for name, factor in fired.items() if factor is not None}
        factors, changed = replace(factors, **changes), frozenset(changes)
        recurrence = Recurrence.of(rule.form(factors, arguments))
        erased = self._fire_sides(recurrence, hook_erase_a="a", hook_erase_b="b")
        if erased is not recurrence:
            recurrence, native_op = erased, None  # ops derive the erase from their other arguments
        if changed & rule.not_fed:
            native_op = None
        if native_op is not None and changed & rule.torch_only:
            native_op = torch_form(native_op)
        fed = rule.arguments(arguments, factors.over_time(padding.packed), changed)
        if native_op is None:
            outputs, state = recurrence.scan()
            native = OpResult(outputs, state if rule.wants_state(fed) else None)
        else:
            native = rule.read_result(native_op(**fed), fed)
            native = native._replace(outputs=padding.spread(native.outputs))
        if changed or native_op is None:
            native = native._replace(outputs=native.outputs.to(rule.output_dtype(arguments)))
        if record is not None:
            first = recurrence.initial_state  # a copy: caches are updated in place after the op returns
            kept = recurrence if first is None else recurrence.replace(initial_state=first.clone())
            record[self.mixer.layer] = Recorded(kept, native, rule.value_first(arguments))
        response = EditResponse(recurrence)
        written = self._fire_sides(recurrence, hook_write_key="k", hook_write_value="u")  # the erase stays as it is
        # k'u'^T - k u^T = (k'-k) u'^T + k (u'-u)^T, which is exactly zero where nothing changed.
        moved = [(written.k - recurrence.k, written.u)] if written.k is not recurrence.k else []
        moved += [(recurrence.k, written.u - recurrence.u)] if written.u is not recurrence.u else []
        for head, (keys, values) in itertools.product(range(recurrence.H), moved):
            response.add_low_rank(LowRankChange(head, keys[:, :, head], values[:, :, head]))
        for plan in run.plans:
            # Each plan edits what those before it and the hooks left, so a plan's changes are complete before any acts.
            edits = plan.by_layer.get(self.mixer.layer, [])
            for change in list(changes_of(plan, edits, recurrence, list(response.low_rank), self.first_token)):
                response.add_low_rank(change)
        for heads, change in self._fire_matrices("write", response.writes):
            response.add_dense(heads, change)
        for heads, change in self._fire_matrices("state_in", response.states_before):
            response.add_states_before(heads, change)
        for heads, change in self._fire_matrices("state", response.states):
            response.add_states(heads, change)
        result = self._fire_pattern(written, response.apply(native))
        if self.hooks.listens("hook_read"):
            result = result._replace(outputs=self.hooks.fire("hook_read", result.outputs))
        return rule.write_result(result._replace(outputs=padding.packed(result.outputs)), arguments)

    def fire_z(self, value: Tensor) -> Tensor:
        """The input [B,T,H*V] of the output projection, after its hook."""
        spread = self.padding.spread(value)
        fired = self.hooks.fire("hook_z", spread.unflatten(-1, (self.mixer.heads, -1))).flatten(-2)
        return fired if spread is value else self.padding.packed(fired)

    # -- hooks

    def _fire_copy(self, hook: str, value: Tensor | None) -> Tensor | None:
        """What a hook makes of ``value``, or None where it changes nothing. It is given a copy: ``value`` may be a view
        of what the layer still uses."""
        if value is None or not self.hooks.listens(hook):
            return None
        fired = self.hooks.fire(hook, value.clone())  # so ``value`` itself tells, in place or not, whether it changed
        graph = fired.requires_grad or (torch.is_grad_enabled() and value.requires_grad)
        return fired if graph or not torch.equal(value, fired) else None

    def _fire_sides(self, r: Recurrence, **hooks: str) -> Recurrence:
        """The recurrence with what ``hooks`` made of the fields that they show; ``r`` itself where nothing changed."""
        for hook, side in hooks.items():
            fired = self._fire_copy(hook, getattr(r, side))
            r = r if fired is None else r.replace(**{side: fired})
        return r

    def _fire_matrices(self, kind: str, build: Callable[[slice], Tensor]) -> Iterator[tuple[slice, Tensor]]:
        """Fire the dense hooks of ``kind`` ("write", "state_in", "state"), built only for heads with a listener: what
        changed, by heads, [B,T,H',K,V]."""
        matrix, vector = f"hook_{kind}", f"hook_{kind}_vec"
        of_all, sets = self.hooks.listens(matrix), cast(Sequence[HookSet], self.hooks.heads)
        heads = [head for head, hooks in enumerate(sets) if hooks.listens(matrix, vector)]
        for where in [slice(None)] if of_all else [slice(head, head + 1) for head in heads]:
            value, changed = build(where), False
            if of_all:
                value, changed = watch(value, partial(self.hooks.fire, matrix))
            for head in heads if of_all else [where.start]:
                hooks, at = sets[head], head if of_all else 0
                for name, shape in ((matrix, value.shape[-2:]), (vector, (-1,))):
                    if hooks.listens(name):
                        given = value[:, :, at].reshape(*value.shape[:2], *shape)
                        fired, moved = watch(given, partial(hooks.fire, name))
                        if moved:
                            others = value[:, :, :at], value[:, :, at + 1 :]
                            new, changed = fired.reshape(*value.shape[:2], 1, *value.shape[3:]), True
                            value = new if value.shape[2] == 1 else torch.cat([others[0], new, others[1]], dim=2)
            if changed:  # in place, perhaps, so the difference is to what is built anew
                yield where, value - build(where)

    def _fire_pattern(self, r: Recurrence, result: OpResult) -> OpResult:
        """Fire ``hook_pattern``; what a hook changed moves the reads, o + (A' - A) u."""
        if not self.hooks.listens("hook_pattern"):
            return result
        past, first = None, self.first_token
        if self.cache is not None and r.initial_state is not None:
            past = sources_of(self.cache, self.mixer.layer, first, r.initial_state)
        reads, keys = r.by_source(None if past is None else past.keys).scan()
        values = r.u if past is None else torch.cat([past.values, r.u], dim=1)
        if self.cache is not None and result.final_state is not None:
            next_token = None if first is None else first + r.T
            keep_sources(self.cache, self.mixer.layer, Sources(keys, values, result.final_state.clone(), next_token))
        pattern = pattern_of(reads, r)
        # Of tokens that a cache holds from passes without a listener nothing is known, and NaN says so.
        unseen = 0 if first is None else first + r.T - values.shape[1]
        known = F.pad(pattern, (*[0] * 2 * (pattern.ndim - 4), unseen, 0), value=torch.nan)
        fired = self._fire_copy("hook_pattern", known)
        if fired is None:
            return result
        change = (fired[:, :, :, unseen:] - pattern).flatten(3) @ values.transpose(1, 2).flatten(2, -2)
        return result._replace(outputs=(result.outputs + change.transpose(1, 2)).to(result.outputs.dtype))
