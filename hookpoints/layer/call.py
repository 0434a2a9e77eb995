"""A hooked recurrent layer, and one forward of it: what happens between an upstream layer and its op."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hookpoints.edits.edit import changes_of
from hookpoints.errors import UnsupportedModelError
from hookpoints.hooks.points import HookSet, MixerHooks
from hookpoints.layer.context import (
    Backend,
    Recorded,
    Sources,
    cache_among,
    cached_state,
    count_tokens,
    current,
    keep_sources,
    sources_of,
)
from hookpoints.layer.intercept import Function, open_handlers, running, torch_form, wrap_forward
from hookpoints.layer.response import EditResponse
from hookpoints.recurrence.recurrence import Recurrence, pattern_of
from hookpoints.rules.base import Arguments, OpFactors, OpResult, Rule, is_update


@dataclass(frozen=True, eq=False)
class Padding:
    """Which tokens of a pass are real, where its layer runs them packed: rows end to end on one time axis.

    fla's layers unpad a batch [B,T,...] to [1,N,...] (N real tokens) and give the op the sequences' bounds. Hooks,
    edits and states keep the batch's own rows and positions; at padding, factors are zero, so nothing is written or
    erased there and the state passes through.
    """

    mask: Tensor | None
    """[B,T] bool, or None where the op is given the batch as it is."""

    def spread(self, x: Tensor) -> Tensor:
        """A packed tensor [1,N,...] in the batch's rows, zero at padding; one that has these already, as it is."""
        if self.mask is None or x.shape[:2] == self.mask.shape:
            return x
        # Not in place, so that gradients pass from the batch's rows to the packed tensor.
        return x.new_zeros(*self.mask.shape, *x.shape[2:]).index_put((self.mask,), x[0])

    def packed(self, x: Tensor) -> Tensor:
        """The way back."""
        return x if self.mask is None else x[self.mask].unsqueeze(0)


UNPADDED = Padding(None)


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
        self.owner = owner
        self.layer = layer
        self.rule = rule
        self.module = module
        self.heads = heads
        self.projection = projection
        self.backend: Backend = backend
        self.runs_alone = in_torch and backend == "auto" and not (rule.kernel_only or rule.starts_from_zero)
        """Whether the layer needs nothing of this package to run."""
        self.hooks = MixerHooks(heads, rule.hook_factors)
        self.calls = 0
        """Op calls so far; the self-check reads it."""

    def needed(self) -> bool:
        """Whether a forward of the layer has to be handled: a hook, an edit or a recording is active, or it does not
        run alone. Inside a forward that is handled it always has, so that its ops do not go to that one's handler."""
        asked = not self.runs_alone or self.hooks.listeners.exist() or current(self.owner).asks_layers
        return asked or bool(open_handlers()) or (self.rule.overwrites and torch.is_grad_enabled())


def hook_layer(mixer: HookedMixer, counts: bool) -> Callable[[], None]:
    """Make a ``LayerCall`` of every forward of the mixer's layer in which it is needed, or of each one if the layer
    ``counts`` the tokens of a cache (in partial runs all do); returns what undoes it."""

    def around(forward: Function, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        call = LayerCall(mixer, args, kwargs)
        if mixer.needed():
            return running(call, forward, args, kwargs)
        return forward(*args, **kwargs)

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
        self.mixer = mixer
        self.module = mixer.module
        self.hooks = mixer.hooks
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
        rule = self.mixer.rule
        self.mixer.calls += 1
        if rule.starts_from_zero and self.cache is not None and not is_update(arguments):
            state = cached_state(self.cache, self.mixer.layer)
            arguments = arguments if state is None else {"initial_state": state, **arguments}
        native_op = self._native_op(op, arguments)
        if native_op is not None and not self._is_observed():
            return native_op(**arguments)
        # fla's layers take the padding out before the op; hooks see the batch's own rows.
        self.padding = Padding(self.real) if arguments.get("cu_seqlens") is not None else UNPADDED
        factors, changed = self._fire_factors(rule.factors(arguments).over_time(self.padding.spread))
        derived = Recurrence.of(rule.form(factors, arguments))
        recurrence = self._fire_sides(derived, hook_erase_a="a", hook_erase_b="b")
        # Ops derive the erase from their other arguments, and take some factors only in the form that they know: these
        # changes only hookpoints' own kernel computes, and others only the op's torch form.
        if recurrence is not derived or changed & rule.not_fed:
            native_op = None
        elif native_op is not None and changed & rule.torch_only:
            native_op = torch_form(native_op)
        fed = rule.arguments(arguments, factors.over_time(self.padding.packed), changed)
        dtype = rule.output_dtype(arguments) if changed or native_op is None else None
        # In a short pass that reads some tokens again, the run says which tokens of the call are computed.
        computed = self.result if self.run.part is None else partial(self.run.part, self)
        result = computed(recurrence, native_op, fed, dtype)
        if self.hooks.listens("hook_read"):
            result = result._replace(outputs=self.hooks.fire("hook_read", result.outputs))
        return rule.write_result(result._replace(outputs=self.padding.packed(result.outputs)), arguments)

    def _is_observed(self) -> bool:
        """Whether a hook, an edit or a recording concerns the layer's op calls."""
        edited = any(self.mixer.layer in plan.by_layer for plan in self.run.plans)
        return edited or self._is_recorded() or self.hooks.listeners.exist()

    def _native_op(self, op: Function, arguments: Arguments) -> Function | None:
        """The function that computes the native pass; None: this package's own kernel does."""
        backend = self.run.backend or self.mixer.backend
        if backend == "recurrence" or not self.mixer.rule.runs(op, arguments):
            return None
        return torch_form(op) if backend == "torch" else op

    def result(
        self, recurrence: Recurrence, native_op: Function | None, fed: Arguments, dtype: torch.dtype | None
    ) -> OpResult:
        """Outputs [B,T,H,V] in ``dtype`` (None: as the op makes them) and the last state, recorded and edited."""
        native = self._native_result(native_op, fed, recurrence)
        if dtype is not None:
            native = native._replace(outputs=native.outputs.to(dtype))
        if self._is_recorded():
            self._keep_recorded(recurrence, native, fed)
        return self._edited_result(recurrence, native) if recurrence.T else native

    def _native_result(self, native_op: Function | None, fed: Arguments, recurrence: Recurrence) -> OpResult:
        """Outputs [B,T,H,V] of the native pass, with padding, and the last state if the layer wants it."""
        rule = self.mixer.rule
        if native_op is None:
            outputs, state = recurrence.scan()
            return OpResult(outputs, state if rule.wants_state(fed) else None)
        native = rule.read_result(native_op(**fed), fed)
        return native._replace(outputs=self.padding.spread(native.outputs))

    def _is_recorded(self) -> bool:
        """Whether the layer is one that `model.recording` asked for."""
        run = self.run
        return run.record is not None and (run.recorded is None or self.mixer.layer in run.recorded)

    def _keep_recorded(self, recurrence: Recurrence, native: OpResult, fed: Arguments) -> None:
        """Keep the call for `model.recording`."""
        assert self.run.record is not None
        first = recurrence.initial_state
        if first is not None:  # caches are updated in place after the op returns
            recurrence = recurrence.replace(initial_state=first.clone())
        recorded = Recorded(recurrence, native, self.mixer.rule.value_first(fed))
        self.run.record[self.mixer.layer] = recorded if self.run.gradients else recorded.detached()

    def _edited_result(self, recurrence: Recurrence, native: OpResult) -> OpResult:
        """What hooks on writes, states and the pattern, and the plans of edits, make of the native result."""
        response = EditResponse(recurrence)
        # The erase stays as it is. What hooks change is looked at in the response.
        written = self._fire_sides(recurrence, seen_later=True, hook_write_key="k", hook_write_value="u")
        for keys, values in _changes_of_sides(recurrence, written):
            response.add_of_heads(keys, values)
        for plan in self.run.plans:
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
        return self._fire_pattern(written, response.apply(native))

    def fire_z(self, value: Tensor) -> Tensor:
        """The input [B,T,H*V] of the output projection, after its hook."""
        spread = self.padding.spread(value)
        fired = self.hooks.fire("hook_z", spread.unflatten(-1, (self.mixer.heads, -1))).flatten(-2)
        if spread is not value:
            return self.padding.packed(fired)
        # By strides, of an axis of length 1 too, torch chooses the kernel of the projection.
        alike = fired.is_contiguous() and value.is_contiguous()
        return fired.as_strided(value.shape, value.stride()) if alike else fired

    # -- hooks

    def _fire_factors(self, factors: OpFactors) -> tuple[OpFactors, frozenset[str]]:
        """The factors after their hooks, and the names of those that changed."""
        changes = dict[str, Tensor]()
        for name in factors.NAMES:
            fired = self._fire_copy(f"hook_{name}", getattr(factors, name))
            if fired is not None:
                changes[name] = fired
        return replace(factors, **changes), frozenset(changes)

    def _fire_copy(self, hook: str, value: Tensor | None, *, seen_later: bool = False) -> Tensor | None:
        """What a hook makes of ``value``, or None where it changes nothing. It is given a copy: ``value`` may be a view
        of what the layer still uses. ``seen_later``: as in `HookSet.watch`."""
        if value is None or not self.hooks.listens(hook):
            return None
        fired, changed = self.hooks.watch(hook, value.clone(), seen_later=seen_later)
        return fired if changed else None

    def _fire_sides(self, r: Recurrence, *, seen_later: bool = False, **hooks: str) -> Recurrence:
        """The recurrence with what ``hooks`` made of the fields that they show; ``r`` itself where nothing changed."""
        for hook, side in hooks.items():
            fired = self._fire_copy(hook, getattr(r, side), seen_later=seen_later)
            r = r if fired is None else r.replace(**{side: fired})
        return r

    def _fire_matrices(self, kind: str, build: Callable[[slice], Tensor]) -> Iterator[tuple[slice, Tensor]]:
        """Fire the dense hooks of ``kind`` ("write", "state_in", "state"), built only for heads with a listener: what
        changed, by heads, [B,T,H',K,V]."""
        matrix = f"hook_{kind}"
        vector = f"hook_{kind}_vec"
        if self.hooks.listeners.names().isdisjoint((matrix, vector)):
            return
        sets = cast(Sequence[HookSet], self.hooks.heads)
        heads = [head for head, hooks in enumerate(sets) if hooks.listens(matrix, vector)]
        if self.hooks.listens(matrix):  # all heads at once; then those with hooks of their own
            value, changed = self.hooks.watch(matrix, build(slice(None)), seen_later=True)
            for head in heads:
                fired = _fire_head(sets[head], matrix, value[:, :, head])
                if fired is not None:
                    value = torch.cat([value[:, :, :head], fired[:, :, None], value[:, :, head + 1 :]], dim=2)
                    changed = True
            if changed:  # in place, perhaps, so the difference is to what is built anew
                yield slice(None), value - build(slice(None))
            return
        for head in heads:
            where = slice(head, head + 1)
            fired = _fire_head(sets[head], matrix, build(where)[:, :, 0])
            if fired is not None:
                yield where, fired[:, :, None] - build(where)

    def _fire_pattern(self, r: Recurrence, result: OpResult) -> OpResult:
        """Fire ``hook_pattern``; what a hook changed moves the reads, o + (A' - A) u."""
        if not self.hooks.listens("hook_pattern"):
            return result
        past = None
        first = self.first_token
        if self.cache is not None and r.initial_state is not None:
            past = sources_of(self.cache, self.mixer.layer, first, r.initial_state)
        reads, keys = r.by_source(None if past is None else past.keys).scan()
        values = r.by_channel().u
        values = values if past is None else torch.cat([past.values, values], dim=1)
        if self.cache is not None and result.final_state is not None:
            next_token = None if first is None else first + r.T
            keep_sources(self.cache, self.mixer.layer, Sources(keys, values, result.final_state.clone(), next_token))
        pattern = pattern_of(reads, r)
        # Of tokens that a cache holds from passes without a listener nothing is known, and NaN says so.
        unseen = 0 if first is None else first + r.T - values.shape[1]
        last_axes = (0, 0) if pattern.ndim == 5 else ()  # the terms of a write
        known = F.pad(pattern, (*last_axes, unseen, 0), value=torch.nan)
        fired = self._fire_copy("hook_pattern", known)
        if fired is None:
            return result
        moved = (fired[:, :, :, unseen:] - pattern).flatten(3)
        change = moved @ values.transpose(1, 2).flatten(2, -2)
        outputs = result.outputs + change.transpose(1, 2).reshape(result.outputs.shape)
        return result._replace(outputs=outputs.to(result.outputs.dtype))


def _fire_head(hooks: HookSet, matrix: str, value: Tensor) -> Tensor | None:
    """What the matrix hook of one head, and then its vector hook, make of [B,T,K,V]; None where both change nothing."""
    after_matrix = value
    by_matrix = False
    if hooks.listens(matrix):
        after_matrix, by_matrix = hooks.watch(matrix, value, seen_later=True)
    vector = f"{matrix}_vec"
    if not hooks.listens(vector):
        return after_matrix if by_matrix else None
    after_vector, by_vector = hooks.watch(vector, after_matrix.flatten(2), seen_later=True)
    return after_vector.view_as(value) if by_matrix or by_vector else None


def _changes_of_sides(native: Recurrence, written: Recurrence) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values of the change of all heads' writes, exactly zero where nothing changed.

    k'u'^T - k u^T = (k'-k) u'^T + k (u'-u)^T.
    """
    if written.k is not native.k:
        yield written.k - native.k, written.u
    if written.u is not native.u:
        yield native.k, written.u - native.u
