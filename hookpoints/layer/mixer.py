"""A hooked recurrent mixer: what happens between an upstream layer and its op."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache

from hookpoints.edits.plan import changes_of
from hookpoints.errors import EditError, Float16OverflowError, UnsupportedModelError
from hookpoints.hooks.points import HookSet, MixerHooks, watch
from hookpoints.layer import context as run_scope
from hookpoints.layer.intercept import running, torch_form
from hookpoints.layer.padding import UNPADDED, Padding
from hookpoints.layer.response import LowRankChange, Response
from hookpoints.recurrence.recurrence import Recurrence
from hookpoints.rules.base import OpFactors as Factors
from hookpoints.rules.base import OpResult, Rule

Backend = Literal["auto", "torch", "recurrence"]
"""Who computes the native pass: upstream's op for the device, upstream's torch op, or hookpoints' own kernel (the only
one that works in float64 where upstream casts to float32, and the one for fla's ops on a CPU: they have no torch
form)."""


class _Changed(NamedTuple):
    """A change of the dense writes or states of some heads."""

    heads: slice
    change: Tensor
    """[B,T,H',K,V]."""


class HookedMixer:
    """Handles the op calls of one recurrent layer.

    With no listener, no edit and backend "auto" it calls the op with the very arguments it was given.
    """

    def __init__(self, owner: Any, layer: int, rule: Rule, module: nn.Module, backend: Backend):
        try:
            heads, _, _ = rule.head_shape(module)
        except AttributeError as error:
            raise UnsupportedModelError(
                f"{type(module).__name__} (layer {layer}) calls {rule.ops[0]}, but does not name its sizes as layers "
                f"of {rule.name} do: {error}"
            ) from error
        self.owner, self.layer, self.rule, self.backend = owner, layer, rule, backend
        self.module = module
        self.hooks = MixerHooks(heads, rule.factor_names)
        self.calls = 0
        """Op calls so far; the self-check reads it."""
        self._seen: WeakKeyDictionary[Cache, int] = WeakKeyDictionary()
        self._first_token: int | None = 0
        self._real: Tensor | None = None
        self._met = False
        """Whether hooks or edits met an op call of this forward."""
        self._open: list[ExitStack] = []
        self._handles = [
            module.register_forward_pre_hook(self._enter, with_kwargs=True),
            # always_call: the scope must close when the layer raises, too; prepend: of scopes of several hooked models
            # on one layer, the last opened closes first.
            module.register_forward_hook(self._leave, with_kwargs=True, always_call=True, prepend=True),
        ]

    def detach(self) -> None:
        """Take the PyTorch hooks off the layer."""
        for handle in self._handles:
            handle.remove()

    # -- scope of one forward of the layer

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = (*args, *kwargs.values())
        cache = next((value for value in values if isinstance(value, Cache)), None)
        hidden = next(value for value in values if isinstance(value, Tensor))
        self._first_token = self._position(cache)
        mask = kwargs.get("attention_mask")
        # [B,T], where the layer is given one in that form.
        self._real = None if mask is None or mask.ndim != 2 else mask[:, -hidden.shape[1] :] != 0
        if cache is not None and self._first_token is not None:
            self._seen[cache] = self._first_token + hidden.shape[1]
        stack = ExitStack()
        stack.enter_context(running(self))
        self._open.append(stack)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._open:
            self._open.pop().close()
        met, self._met = self._met, False
        value = output[0] if isinstance(output, tuple) else output
        if met and isinstance(value, Tensor) and value.dtype == torch.float16:
            _check_range(self.layer, output=value)

    def _position(self, cache: Cache | None) -> int | None:
        """Position of this pass's first token; None where a cache does not tell."""
        run = run_scope.current(self.owner)
        if run.first_token is not None:
            return run.first_token
        if cache is None:
            return 0
        if not _is_filled(cache, self.layer):
            return 0
        if cache in self._seen:
            return self._seen[cache]
        try:
            return cache.get_seq_length()
        except ValueError:  # only linear layers, and filled by someone else
            return None

    # -- one op call

    def handle(self, op: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        """Run the op with hooks and edits around it; returns what the layer expects from the op."""
        self.calls += 1
        run = run_scope.current(self.owner)
        chosen = self._chosen(op, arguments, run.backend or self.backend)
        placed = run.plan.by_layer.get(self.layer, []) if run.plan else []
        if not placed and run.record is None and chosen is not None and not self.hooks.listening():
            return chosen(**arguments)
        padding = self._padding(arguments)
        factors, changed = self._fire_factors(padding.spread(self.rule.factors(arguments)))
        recurrence = self.rule.recurrence(factors, arguments)
        if chosen is not None and changed & self.rule.torch_only:
            chosen = torch_form(chosen)
        fed = self.rule.arguments(arguments, padding.packed(factors), changed)
        native = self._native(chosen, fed, recurrence, padding)
        if changed or chosen is None:
            native = native._replace(outputs=native.outputs.to(self.rule.output_dtype(arguments)))
        if run.record is not None:
            run.record[self.layer] = run_scope.Recorded(_owning_state(recurrence), native)
        response = Response(recurrence)
        for change in self._fire_write_factors(recurrence):
            response.add_low_rank(change)
        if placed:
            if self._first_token is None:
                raise EditError(
                    f"layer {self.layer} cannot tell at which position it continues this cache, so edits with a "
                    "position cannot be placed: fill the cache with this model, or run the whole sequence"
                )
            hooked = list(response.low_rank)
            for change in changes_of(placed, recurrence, hooked, self._first_token, run.plan):
                response.add_low_rank(change)
        for heads, change in self._fire_matrices("write", response.writes):
            response.add_dense(heads, change)
        for heads, change in self._fire_matrices("state", response.states):
            response.add_states(heads, change)
        result = self._fire_read(response.apply(native))
        self._met = True
        if result.outputs.dtype == torch.float16:
            _check_range(self.layer, read=result.outputs, state=result.final_state)
        return self.rule.write_result(padding.packed_result(result), arguments)

    def _chosen(
        self, op: Callable[..., Any], arguments: Mapping[str, Any], backend: Backend | str
    ) -> Callable[..., Any] | None:
        """What computes the native pass; None: hookpoints' own kernel."""
        if backend == "recurrence" or not self.rule.runs(op, arguments):
            return None
        return torch_form(op) if backend == "torch" else op

    def _padding(self, arguments: Mapping[str, Any]) -> Padding:
        """Where the padding of this pass is, if the op is given the batch without it."""
        return Padding(self._real) if arguments.get("cu_seqlens") is not None else UNPADDED

    def _native(
        self, op: Callable[..., Any] | None, arguments: Mapping[str, Any], recurrence: Recurrence, padding: Padding
    ) -> OpResult:
        """The pass without edits of writes, states and reads; by hookpoints' own kernel where no op is given."""
        if op is None:
            outputs, state = recurrence.scan()
            return OpResult(outputs, state if self.rule.wants_state(arguments) else None)
        return padding.spread_result(self.rule.read_result(op(**arguments), arguments))

    # -- hooks

    def _fire_factors(self, factors: Factors) -> tuple[Factors, frozenset[str]]:
        """Factors after their hooks, and the names of those that changed."""
        changes: dict[str, Tensor] = {}
        for name in factors.present():
            hook = f"hook_{name}"
            if self.hooks.listens(hook):
                # A copy: the tensor may be a view of what the layer still uses.
                own = getattr(factors, name)
                seen = watch(own.clone(), lambda x, hook=hook: self.hooks.fire(hook, x))
                if seen.changed and (seen.value.requires_grad or not torch.equal(seen.value, own)):
                    changes[name] = seen.value
        return factors.with_(**changes), frozenset(changes)

    def _fire_write_factors(self, r: Recurrence) -> Iterator[LowRankChange]:
        """k'u'^T - k u^T as (k'-k) u'^T + k (u'-u)^T, which is exactly zero where nothing changed."""
        key_change = self._fire_side("hook_write_key", r.k)
        value_change = self._fire_side("hook_write_value", r.u)
        values = r.u if value_change is None else r.u + value_change
        for head in range(r.H):
            if key_change is not None:
                yield LowRankChange(head, key_change[:, :, head], values[:, :, head])
            if value_change is not None:
                yield LowRankChange(head, r.k[:, :, head], value_change[:, :, head])

    def _fire_side(self, hook: str, side: Tensor) -> Tensor | None:
        """What a hook on one side of the write adds to it, or None."""
        if not self.hooks.listens(hook):
            return None
        seen = watch(side.clone(), lambda x: self.hooks.fire(hook, x))
        return seen.value - side if seen.changed else None

    def _fire_matrices(self, kind: str, build: Callable[[slice], Tensor]) -> Iterator[_Changed]:
        """Fire the dense hooks of ``kind`` ("write", "state"), built only for heads with a listener."""
        names = (f"hook_{kind}", f"hook_{kind}_vec")
        heads = self.hooks.heads_listening(*names)
        if not self.hooks.listens(names[0]):
            for head in heads:
                one = slice(head, head + 1)
                value = build(one)
                changed = self._fire_head(head, names, value[:, :, 0])
                if changed is not None:
                    # Firing may have edited `value` in place, so the difference is against a fresh one.
                    yield _Changed(one, changed.unsqueeze(2) - build(one))
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
            yield _Changed(slice(None), result - build(slice(None)))

    def _fire_head(self, head: int, names: tuple[str, str], value: Tensor) -> Tensor | None:
        hooks, changed = self.hooks.heads[head], False
        assert isinstance(hooks, HookSet)
        for name, shape in ((names[0], value.shape), (names[1], (*value.shape[:2], -1))):
            if hooks.listens(name):
                seen = watch(value.reshape(shape), lambda x, name=name: hooks.fire(name, x))
                value = seen.value.reshape(value.shape)
                changed = changed or seen.changed
        return value if changed else None

    def _fire_read(self, result: OpResult) -> OpResult:
        if not self.hooks.listens("hook_read"):
            return result
        return result._replace(outputs=self.hooks.fire("hook_read", result.outputs))


def _is_filled(cache: Cache, layer: int) -> bool:
    try:
        return cache.has_previous_state(layer)
    except ValueError:  # caches whose layers are of another kind (fla's) tell it by their length
        return cache.get_seq_length(layer) > 0


def _check_range(layer: int, **values: Tensor | None) -> None:
    """Raise where values leave float16's range: downstream they would turn into NaN without a word."""
    for what, value in values.items():
        if value is not None and not bool((value.abs() <= torch.finfo(torch.float16).max).all()):
            raise Float16OverflowError(
                f"the {what} of layer {layer} leaves float16's range (65504), by the model's own numbers or with the "
                "hooks and edits in force; load the model with dtype=torch.bfloat16 or torch.float32, or edit with "
                "smaller matrices"
            )


def _owning_state(r: Recurrence) -> Recurrence:
    """The same with a state of its own: caches are updated in place after the op returns."""
    return r if r.initial_state is None else r.replace(initial_state=r.initial_state.clone())
