"""What one run of a hooked model carries besides its inputs: edits, recordings, where it starts. A scoped value.

All of it lives in context variables, so that each thread (and each asynchronous task) has its own. A scope closes by
its own flag before it leaves the context variable: an interrupt between the two leaves nothing in force.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from hookpoints.edits.edit import EditPlan
from hookpoints.rules.base import OpResult
from hookpoints.scopes import scoped

if TYPE_CHECKING:
    from hookpoints.recurrence.recurrence import Recurrence

Backend = Literal["auto", "torch", "recurrence"]
"""Who computes the native pass: upstream's op for the device, upstream's torch op, or hookpoints' own kernel (the only
one that works in float64 where upstream casts to float32, and the one for fla's ops on a CPU: they have no torch
form)."""


class Recorded(NamedTuple):
    """One op call as it ran natively."""

    recurrence: Recurrence
    """Canonical factors, after factor hooks."""
    native: OpResult
    """What the op returned, before edits of writes, states and reads."""
    value_first: bool = False
    """Whether the op, and so the layer's cache, has states [B,H,V,K]."""

    def detached(self) -> Recorded:
        """The same without autograd graphs, each of which would hold the whole pass."""
        outputs, state = self.native
        native = OpResult(outputs.detach(), None if state is None else state.detach())
        return self._replace(recurrence=self.recurrence.detached(), native=native)


def all_left(record: Mapping[int, Recorded], states: Mapping[int, Tensor]) -> bool:
    """Whether ops left the ``states`` [B,H,K,V] of a cache, by layer, so that the factors explain them: an edit, or a
    hook on writes or states, is not in them. Costs one look at each device."""
    sides: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
    for layer, recorded in record.items():
        state, final = states[layer], recorded.native.final_state
        if final is None:
            return False
        sides.setdefault(state.device, []).append((state.flatten(), final.to(state.dtype).flatten()))
    return all(torch.equal(*(torch.cat(side) for side in zip(*pairs))) for pairs in sides.values())


@dataclass(frozen=True, eq=False)
class Run:
    """What is in force for one hooked model."""

    plans: tuple[EditPlan, ...] = ()
    """Write edits, outer scopes first; each plan acts on the model as those before it edited it."""
    record: dict[int, Recorded] | None = None
    """If given, each recurrent layer leaves its last op call here."""
    recorded: Container[int] | None = None
    """Layers that do; None: all."""
    gradients: bool = False
    """Whether recordings keep their autograd graph."""
    first_token: int | None = None
    """Position of the first token of a pass; None: counted from the cache."""
    backend: Backend | None = None
    """Who computes the native pass; None: as the model was loaded."""
    part: Callable[..., OpResult] | None = None
    """What runs a part of the tokens of a recurrent layer's call: given the call and the arguments of its `result`, it
    returns what that returns. None: all tokens run, from what the cache holds."""
    start_layer: int = 0
    """Blocks below are skipped."""
    residual: Tensor | None = None
    """[B,T,D] fed into block ``start_layer``; None: what the block is given."""
    embedded: Tensor | None = None
    """[B,T,D], what the embedding of tokens gives; None: its own."""
    stop_layer: int | None = None
    """The pass ends before this block."""
    in_pass: bool = False
    """Whether a forward pass of the model is under way."""
    position: int | None = None
    """Position of the first token of the pass under way; None: its cache does not tell."""

    @cached_property
    def asks_layers(self) -> bool:
        """Whether recurrent layers have more to do than to run."""
        changed = self.record is not None or self.backend is not None or self.part is not None
        return bool(self.plans) or changed or self.partial

    @cached_property
    def partial(self) -> bool:
        """Whether blocks are skipped, or one is fed."""
        return self.start_layer > 0 or self.stop_layer is not None or self.residual is not None


class StopForward(Exception):
    """Raised inside a forward pass to end it at a block; carries the residual stream [B,T,D] that enters the block."""

    def __init__(self, residual: Tensor):
        super().__init__("forward stopped at a block")
        self.residual = residual


class HookScope:
    """A stretch of a program in which a hooked model runs otherwise. Opened by ``scope``."""

    def __init__(self, owner: object, plans: tuple[EditPlan, ...], changes: dict[str, object]):
        self.owner = owner
        self.plans = plans
        self.changes = changes
        self.open = True
        self.passes = 0
        """Forward passes of the model inside this scope, in its own context."""
        self.merged: tuple[Run | None, Run] = (None, _NOTHING)
        """The run outside of it, and inside: made once, for each hooked module of a pass asks for it."""

    def active(self) -> bool:
        """Whether code that runs now is inside this scope.

        Autograd runs backward passes on a GPU in its own threads, which have no context; they count as inside of
        every open scope.
        """
        return self.open and (self in _SCOPES.get() or isinstance(threading.current_thread(), threading._DummyThread))


_NOTHING = Run()
_SCOPES: ContextVar[tuple[HookScope, ...]] = ContextVar("hookpoints_scopes", default=())


def current(owner: object) -> Run:
    """The run in force for ``owner`` (an attachment); other hooked models' runs do not concern it."""
    run = _NOTHING
    for opened in _SCOPES.get():
        if opened.owner is owner and opened.open:
            outside, inside = opened.merged
            if outside is not run:
                inside = replace(run, **{"plans": run.plans + opened.plans, **opened.changes})
                opened.merged = run, inside
            run = inside
    return run


@scoped
def scope(owner: object, added: tuple[EditPlan, ...] = (), **changes: object) -> Iterator[HookScope]:
    """Put ``changes`` (fields of ``Run``) in force on top of what is, for the length of the scope, and ``added`` after
    the plans in force. Scopes may close in any order."""
    opened = HookScope(owner, added, changes)
    try:
        _SCOPES.set((*_SCOPES.get(), opened))
        yield opened
    finally:
        opened.open = False
        _SCOPES.set(tuple(other for other in _SCOPES.get() if other.open))


def count_pass(owner: object) -> None:
    """Note in every open scope of ``owner`` that the model runs."""
    for opened in _SCOPES.get():
        if opened.owner is owner:
            opened.passes += 1


# -- where a pass begins: how many tokens its cache holds

_TOKENS = "_hookpoints_tokens"
"""Attribute on caches of recurrent layers alone. They hold no length, so hooked layers count there; deep copies of a
cache take the count with them."""


def position_of(cache: Cache | None) -> int | None:
    """Number of tokens in ``cache``, which is the position of the next one; None where nothing tells.

    It must be read before any layer runs: attention layers advance a cache during the pass.
    """
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except ValueError:  # only linear layers, which hold no length
        counted = getattr(cache, _TOKENS, None)
        return counted if isinstance(counted, int) else None if cache.has_previous_state() else 0


def count_tokens(cache: Cache, tokens: int) -> None:
    """Note that a pass fills ``cache`` up to ``tokens``."""
    setattr(cache, _TOKENS, tokens)


class CountingCache(DynamicCache):
    """A cache of recurrent layers alone that tells its length, which hooked layers count: classes of transformers that
    are made for hybrids ask each cache for it, and upstream's own cache raises where no layer is attention."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens, the same in all layers."""
        return getattr(self, _TOKENS, 0)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Sizes of a mask that no layer will use."""
        return self.get_seq_length() + query_length, 0


_SOURCES = "_hookpoints_sources"
"""Attribute on caches: ``Sources`` by layer. As the count above, it lives, is copied and dies with the cache."""


class Sources(NamedTuple):
    """The tokens in a cache as sources of a layer's later reads: K + V numbers per token and head."""

    keys: Tensor
    """[B,H,K,S R], the key of each write as the transitions since have left it (``Recurrence.by_source``)."""
    values: Tensor
    """[B,S,H,V] or [B,S,H,R,V]."""
    state: Tensor
    """[B,H,K,V], the state that the cache was given with them."""
    next_token: int | None
    """Position of the token that follows; None where nothing tells."""


def keep_sources(cache: Cache, layer: int, sources: Sources) -> None:
    """Note the sources of what ``cache`` holds for ``layer``."""
    setattr(cache, _SOURCES, {**getattr(cache, _SOURCES, {}), layer: sources})


def drop_sources(cache: Cache) -> None:
    """Forget the sources: the states are no longer theirs."""
    vars(cache).pop(_SOURCES, None)


def sources_of(cache: Cache, layer: int, first_token: int | None, state: Tensor) -> Sources | None:
    """The sources of a pass that begins at ``first_token`` with ``state`` [B,H,K,V]; None where they are not known.

    Upstream code repeats the rows of a cache and changes their order (beams, edited runs). States tell which is which:
    each row takes the sources of the row that left its state.
    """
    sources: Sources | None = getattr(cache, _SOURCES, {}).get(layer)
    if sources is None or sources.next_token != first_token:
        return None
    rows = (state.flatten(1).float(), sources.state.flatten(1).float())
    gap, row = torch.cdist(*rows, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    # Caches may round the state to the model's dtype.
    if bool((gap > 0.01 * rows[1].norm(dim=1)[row]).any()):
        return None
    return Sources(sources.keys[row], sources.values[row], sources.state[row], first_token)


def cached_state(cache: Cache, layer: int) -> Tensor | None:
    """What a cache of transformers holds as the state of a recurrent layer, as the layer put it there."""
    states = vars(cache.layers[layer]).get("recurrent_states")
    return states.get(0) if isinstance(states, dict) else states


def cache_among(*values: object) -> Cache | None:
    """The cache among a module's arguments. Its name differs between versions of transformers, its type does not."""
    return next((value for value in values if isinstance(value, Cache)), None)
