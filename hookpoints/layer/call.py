"""A hooked recurrent layer, and one forward of it: what happens between an upstream layer and its op."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hookpoints.edits.edit import LowRankChange, changes_of
from hookpoints.errors import Float16OverflowError, UnsupportedModelError
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
from hookpoints.rules.base import Arguments, OpFactors, OpResult, Rule


class HookedMixer:
    """What is known of one recurrent layer. It holds nothing of a call (see ``LayerCall``), so threads share it.

    Args:
        owner: the attachment; runs of other hooked models do not concern this one.
        layer: block index.
        projection: the layer's own, which takes what the heads hand on.
        backend: who computes the native pass.

    Raises:
        UnsupportedModelError: the layer calls the rule's op but does not name its sizes as the rule's layers do.
    """

    def __init__(
        self, owner: object, layer: int, rule: Rule, module: nn.Module, projection: nn.Module, backend: Backend
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
        self.hooks = MixerHooks(heads, rule.factor_names)
        self.calls = 0
        """Op calls so far; the self-check reads it."""


def hook_layer(mixer: HookedMixer) -> Callable[[], None]:
    """Make a ``LayerCall`` of every forward of the mixer's layer; returns what undoes it."""

    def around(forward: Function, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        call = LayerCall(mixer, args, kwargs)
        output = running(call, forward, args, kwargs)
        call.check_output(output)
        return output

    return wrap_forward(mixer.module, around)


def hook_projection(mixer: HookedMixer) -> Callable[[], None]:
    """Fire ``hook_z`` on what the layer gives its output projection; returns what undoes it."""

    def around(forward: Function, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        calls = (call for call in open_handlers() if isinstance(call, LayerCall) and call.mixer is mixer)
        call = next(calls, None) if mixer.hooks.listens("hook_z") else None
        if call is None:
            return forward(*args, **kwargs)
        (value, *others) = args
        assert isinstance(value, Tensor)
        return forward(call.fire_z(value), *others, **kwargs)

    return wrap_forward(mixer.projection, around)


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
        self.met = False
        """Whether hooks or edits met this forward."""
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
        """The layer's output projection, where someone listens to what it is given."""
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
        if not edited and record is None and native_op is not None and not self.hooks.listening():
            return native_op(**arguments)
        # fla's layers take the padding out before the op.
        padding = self.padding = Padding(self.real) if arguments.get("cu_seqlens") is not None else UNPADDED
        factors, changed = self._fire_factors(padding.spread(rule.factors(arguments)))
        recurrence = Recurrence.of(rule.form(factors, arguments))
        if native_op is not None and changed & rule.torch_only:
            native_op = torch_form(native_op)
        fed = rule.arguments(arguments, padding.packed(factors), changed)
        if native_op is None:
            outputs, state = recurrence.scan()
            native = OpResult(outputs, state if rule.wants_state(fed) else None)
        else:
            native = padding.spread_result(rule.read_result(native_op(**fed), fed))
        if changed or native_op is None:
            native = native._replace(outputs=native.outputs.to(rule.output_dtype(arguments)))
        if record is not None:
            first = recurrence.initial_state  # a copy: caches are updated in place after the op returns
            kept = recurrence if first is None else recurrence.replace(initial_state=first.clone())
            record[self.mixer.layer] = Recorded(kept, native)
        response = EditResponse(recurrence)
        written = self._fire_write_factors(recurrence)
        for change in _changes_between(recurrence, written):
            response.add_low_rank(change)
        for plan in run.plans:
            # Each plan edits what those before it and the hooks left, so a plan's changes are complete before any acts.
            edits = plan.by_layer.get(self.mixer.layer, [])
            for change in list(changes_of(plan, edits, recurrence, list(response.low_rank), self.first_token)):
                response.add_low_rank(change)
        for heads, change in self._fire_matrices("write", response.writes):
            response.add_dense(heads, change)
        for heads, change in self._fire_matrices("state", response.states):
            response.add_states(heads, change)
        result = self._fire_pattern(written, response.apply(native))
        if self.hooks.listens("hook_read"):
            result = result._replace(outputs=self.hooks.fire("hook_read", result.outputs))
        self.met = True
        if result.outputs.dtype == torch.float16:
            _check_range(self.mixer.layer, read=result.outputs, state=result.final_state)
        return rule.write_result(padding.packed_result(result), arguments)

    def fire_z(self, value: Tensor) -> Tensor:
        """The input [B,T,H*V] of the output projection, after its hook."""
        self.met = True
        z = self.padding.spread_tokens(value).unflatten(-1, (self.mixer.heads, -1))
        return self.padding.packed_tokens(self.hooks.fire("hook_z", z).flatten(-2), like=value)

    def check_output(self, output: object) -> None:
        """Raise Float16OverflowError if hooks or edits acted and the layer's output leaves float16's range."""
        value = output[0] if isinstance(output, tuple) else output
        if self.met and isinstance(value, Tensor) and value.dtype == torch.float16:
            _check_range(self.mixer.layer, output=value)

    # -- hooks

    def _fire_factors(self, factors: OpFactors) -> tuple[OpFactors, frozenset[str]]:
        """Factors after their hooks, and the names of those that changed."""
        changes: dict[str, Tensor] = {}
        for name in factors.present():
            hook = f"hook_{name}"
            if self.hooks.listens(hook):
                # A copy: the tensor may be a view of what the layer still uses.
                factor: Tensor = getattr(factors, name)
                seen = watch(factor.clone(), lambda x, hook=hook: self.hooks.fire(hook, x))
                if seen.value.requires_grad or not torch.equal(seen.value, factor):
                    changes[name] = seen.value
        return replace(factors, **changes), frozenset(changes)

    def _fire_write_factors(self, r: Recurrence) -> Recurrence:
        """The recurrence with the writes k'u'^T that hooks made of k u^T; its fields are those of ``r`` where nothing
        changed, and the erase is always."""
        for hook, side in (("hook_write_key", "k"), ("hook_write_value", "u")):
            if self.hooks.listens(hook):
                factor: Tensor = getattr(r, side)
                seen = watch(factor.clone(), lambda x, hook=hook: self.hooks.fire(hook, x))
                r = r.replace(**{side: seen.value}) if seen.changed else r
        return r

    def _fire_matrices(self, kind: str, build: Callable[[slice], Tensor]) -> Iterator[tuple[slice, Tensor]]:
        """Fire the dense hooks of ``kind`` ("write", "state"), built only for heads with a listener: what changed, by
        heads, [B,T,H',K,V]."""
        names = (f"hook_{kind}", f"hook_{kind}_vec")
        heads = self.hooks.heads_listening(*names)
        if not self.hooks.listens(names[0]):
            for head in heads:
                one = slice(head, head + 1)
                value = build(one)
                changed = self._fire_head(head, names, value[:, :, 0])
                if changed is not None:
                    # Firing may have edited `value` in place, so the difference is against a fresh one.
                    yield (one, changed.unsqueeze(2) - build(one))
            return
        value = build(slice(None))
        seen = watch(value, lambda x: self.hooks.fire(names[0], x))
        result, changed = seen.value, seen.changed
        for head in heads:
            edited = self._fire_head(head, names, result[:, :, head])
            if edited is not None:
                result, changed = result.clone(), True
                result[:, :, head] = edited
        if changed:
            yield (slice(None), result - build(slice(None)))

    def _fire_head(self, head: int, names: tuple[str, str], value: Tensor) -> Tensor | None:
        hooks, changed = self.hooks.heads[head], False
        assert isinstance(hooks, HookSet)
        for name, shape in ((names[0], value.shape), (names[1], (*value.shape[:2], -1))):
            if hooks.listens(name):
                seen = watch(value.reshape(shape), lambda x, name=name: hooks.fire(name, x))
                value = seen.value.reshape(value.shape)
                changed = changed or seen.changed
        return value if changed else None

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
        fired = watch(known.clone(), lambda x: self.hooks.fire("hook_pattern", x))
        if not fired.changed:
            return result
        change = (fired.value[:, :, :, unseen:] - pattern).flatten(3) @ values.transpose(1, 2).flatten(2, -2)
        return result._replace(outputs=(result.outputs + change.transpose(1, 2)).to(result.outputs.dtype))


def _changes_between(r: Recurrence, written: Recurrence) -> Iterator[LowRankChange]:
    """k'u'^T - k u^T as (k'-k) u'^T + k (u'-u)^T, which is exactly zero where nothing changed."""
    key_change = None if written.k is r.k else written.k - r.k
    value_change = None if written.u is r.u else written.u - r.u
    for head in range(r.H):
        if key_change is not None:
            yield LowRankChange(head, key_change[:, :, head], written.u[:, :, head])
        if value_change is not None:
            yield LowRankChange(head, r.k[:, :, head], value_change[:, :, head])


def _check_range(layer: int, **values: Tensor | None) -> None:
    """Raise where values leave float16's range: downstream they would turn into NaN without a word."""
    for what, value in values.items():
        if value is not None and not bool((value.abs() <= torch.finfo(torch.float16).max).all()):
            raise Float16OverflowError(
                f"the {what} of layer {layer} leaves float16's range (65504), by the model's own numbers or with the "
                "hooks and edits in force; load the model with dtype=torch.bfloat16 or torch.float32, or edit with "
                "smaller matrices"
            )
