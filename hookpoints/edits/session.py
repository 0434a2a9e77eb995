"""Many edits of one sequence: the plain pass runs once, and each edited run branches off where it first differs."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from hookpoints.edits.edit import EditPlan, EditRow, EditRows, as_edits, as_rows
from hookpoints.errors import EditError, UnsupportedModelError
from hookpoints.fla.scope import is_fla
from hookpoints.hooks.guard import HookSpecs
from hookpoints.layer.context import Backend, Recorded, all_left, current, scope
from hookpoints.memory.caches import attention_of, cut, put_state, state_of, tensors_of
from hookpoints.model.hooked import HookedModel
from hookpoints.model.inputs import as_tokens, cache_of, check_tokens, continuing
from hookpoints.recurrence.recurrence import Recurrence
from hookpoints.scopes import threads_for

_CALL = {"cpu": 64}
"""Tokens of one row that cost as much as a further pass, in which rows are run apart. 512 elsewhere: in the time of so
many a GPU reads its weights."""
_ROOM = {"cpu": 4096}
"""Tokens of one pass by device: on a CPU, runs of 40,000, which no cache holds, took 2.5 times as long a token."""


class EditedRun(NamedTuple):
    """Logits of N edited runs of one sequence, from the first edited position on (before it nothing differs); or those
    after the last tokens, which a session keeps alone."""

    logits: Tensor
    """[N, stop-start, vocab]; row n is the run with the n-th entry of ``rows``."""
    start: int
    """First edited position."""
    stop: int
    """End of the stretch, exclusive."""


def _is_trained(factor: Tensor) -> bool:
    """Whether ``factor`` is itself what an optimizer would change; factors that were computed have a graph whenever
    the model's weights do, which asks for nothing."""
    origin = factor if factor._base is None or factor._base.numel() != factor.numel() else factor._base
    return origin.requires_grad and origin.is_leaf


def _entering_hook(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_pre"


class EditSession:
    """The plain pass over one sequence, kept, so that edited runs cost only what differs.

    A run with edits at layer l and position t recomputes tokens t.. of blocks l.. for each row, from the residual
    stream that the plain pass left below l and the memory that it had at t: states from its factors, what convolutions
    hold, and attention's keys and values up to t. Where a cache keeps no past (sliding windows, fla's own, transformers
    before 5.24), or edits and hooks act on the plain pass, one row walks the tokens before t again; it resumes from
    where it was last, so that calls with rising positions walk each token once.
    Edits in force when the session is made are part of its plain pass, and of every run. Not for use by several
    threads at once: each makes its own session.

    Args:
        model: the hooked model.
        tokens: [1,T].
        logits_to_keep: compute and hold the logits after so many last tokens alone, for `run_hooked`; 0: after all.
    """

    def __init__(self, model: HookedModel, tokens: Tensor, *, logits_to_keep: int = 0):
        self.model = model
        self.tokens = _one_sequence(model, tokens)
        self._outer_plans = current(model.attachment).plans
        names = [name for layer in model.cfg.recurrent_layers if (name := _entering_hook(layer)) in model.hook_dict]
        self._weights = sum(weight.numel() for weight in model.hf_model.parameters())
        held = _recording_cache(model)
        self._logits: dict[str, Any] = {"logits_to_keep": logits_to_keep} if logits_to_keep else {}
        inputs: dict[str, Any] = {} if held is None else continuing(model.hf_model, held, 0, self.tokens)
        with torch.no_grad(), threads_for(tokens.numel() * self._weights), model.recording() as record:
            self.logits, cache = model.run_with_cache(tokens, names_filter=names, **inputs, **self._logits)
        """[1,T,vocab] logits of the plain pass, or the last of them."""
        self._residual = {name: cache[name] for name in names}
        self._held = held if held is not None and _has_all(held, record, tokens.shape[1]) else None
        """The cache of the plain pass, if that can be cut at any token."""
        self._recurrences = {layer: recorded.recurrence for layer, recorded in record.items()}
        self._value_first = {layer: recorded.value_first for layer, recorded in record.items()}
        self._states: dict[int, tuple[int, Tensor | None]] = {}
        """How many tokens a layer's state [1,H,K,V] is after, and that state, where runs began last."""
        self._prefix: tuple[int, Cache | None] = (0, None)
        """The same of one row's cache, where the plain pass' own cannot be cut."""

    def recurrence(self, layer: int) -> Recurrence:
        """Canonical factors of a recurrent layer in the plain pass."""
        self.model.cfg.layer(layer)
        return self._recurrences[layer]

    def residual(self, layer: int) -> Tensor:
        """[1,T,D] residual stream entering a recurrent block in the plain pass."""
        self.model.cfg.layer(layer)
        if not self.model.attachment.layout.is_chain:
            raise UnsupportedModelError("the blocks of this model are no chain along one residual stream that is known")
        return self._residual[_entering_hook(layer)]

    def run(
        self,
        rows: EditRows,
        stop: int | None = None,
        batch_size: int = 64,
        gradients: bool = False,
        apart: bool = True,
    ) -> EditedRun:
        """Run the sequence once per entry of ``rows``, each from about its first edit on (`batches`).

        Args:
            rows: one WriteEdit, several, or none (``[]``: the unedited run, for a baseline with the same arithmetic).
                A WriteEdit alone is one row.
            stop: run up to this position, exclusive; None: to the end.
            batch_size: rows at once; memory grows with batch_size * (stop - start) * vocab.
            gradients: give logits that can be differentiated, by keys and values of edits and by whatever else a pass
                depends on. Each row is then a whole pass, since what the plain pass left has no graph, and the
                activations of all rows stay in memory (fewer with ``hf_model.requires_grad_(False)``).
            apart: rows of far positions may run in separate passes. False: all of a batch in one pass, from the
                first edited position on, so that a hook meets them together.

        Raises:
            EditError: an edit does not fit the model or is outside the sequence, there is none at all, or one has a
                tensor that is being trained though there will be no ``gradients``.
        """
        if self._logits:
            raise EditError("run: expected a session of all logits, got one of the last; use run_hooked")
        rows = as_rows(rows)
        plan = EditPlan.for_rows(rows)
        start, stop = _checked_stretch(self.model, self.tokens, plan, stop, batch_size)
        if not gradients:
            _refuse_trained((*self._outer_plans, plan))
        # With gradients all rows from the same token on: what is before an own edit may depend on outer ones.
        apart = apart and not gradients
        firsts = [start] * len(rows)  # where each row first differs, or where all of a batch begin
        if apart:
            firsts = [min((edit.position or 0 for edit in as_edits(row)), default=start) for row in rows]
        logits = self.logits[:, start:stop].repeat(len(rows), 1, 1)
        numbers = list(range(len(rows)))
        batches: Iterable[list[int]] = [numbers[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        if apart:
            batches = self.batches(firsts, stop, batch_size)
        with torch.set_grad_enabled(gradients and torch.is_grad_enabled()):
            for batch in batches:
                # Up to its first edit a row is the plain pass, whose logits are there already.
                first = min(firsts[row] for row in batch)
                begin = 0 if gradients else first
                fresh = self._run_batch([rows[row] for row in batch], begin, stop, gradients)
                logits[batch, first - start :] = fresh[:, first - begin :]
        return EditedRun(logits, start, stop)

    def batches(
        self,
        positions: Sequence[int],
        stop: int,
        most: int,
        *,
        window: int | None = None,
        room: int | None = None,
    ) -> Iterator[list[int]]:
        """Rows that run together, by the tokens ``positions`` from which each differs; in the order of these.

        A pass begins at its first row's position, so that it runs tokens of the others that do not differ. Rows are
        parted where these come to cost as much as a pass does.

        Args:
            stop: end of all runs, exclusive.
            most: rows at once.
            window: tokens that each run has from its position on, instead of ``stop``.
            room: tokens at once.
        """
        room_of_device = _ROOM.get(self.tokens.device.type, 2**62)
        room = min(room or room_of_device, room_of_device)
        batch = list[int]()
        wasted = 0
        for row in sorted(range(len(positions)), key=lambda row: positions[row]):
            if batch:
                ahead = positions[row] - positions[batch[0]]
                count = len(batch) + 1
                wasted = wasted + ahead if window is None else ahead * count
                length = stop - positions[batch[0]] if window is None else ahead + window
                if wasted > _CALL.get(self.tokens.device.type, 512) or count * length > room or count > most:
                    yield batch
                    batch = []
                    wasted = 0
            batch.append(row)
        yield batch

    @torch.no_grad()
    def run_hooked(self, rows: int, layer: int, start: int, fwd_hooks: HookSpecs) -> EditedRun:
        """Run the sequence ``rows`` times with hooks that change block ``layer`` or those above, at tokens from
        ``start`` on. They see [rows,T',...], the tokens from `EditedRun.start` on."""
        lowest = max((recurrent for recurrent in self.model.cfg.recurrent_layers if recurrent <= layer), default=0)
        stop = self.tokens.shape[1]
        logits = self._run_batch([[]] * rows, start, stop, False, lowest, fwd_hooks)
        return EditedRun(logits, start, stop)

    def _run_batch(
        self,
        rows: Sequence[EditRow],
        start: int,
        stop: int,
        through_all: bool,
        lowest: int | None = None,
        fwd_hooks: HookSpecs = (),
    ) -> Tensor:
        """Logits [N,stop-start,vocab] of a pass over some tokens, ``through_all`` blocks, from the first edited
        one on, or from ``lowest`` on."""
        model = self.model
        plan = EditPlan.for_rows(rows)
        layout = self.model.attachment.layout
        lowest = min(plan.by_layer, default=0) if lowest is None else lowest
        layer = 0 if through_all or not layout.is_chain or layout.first_block_feeds_all else lowest
        residual = None if through_all else self._residual.get(_entering_hook(layer))
        if residual is not None:
            residual = residual[:, start:stop].expand(len(rows), -1, -1)
        tokens = self.tokens[:, start:stop].expand(len(rows), -1)
        # Tokens, not the residual stream: some models hand the embeddings to later blocks again.
        branch = self._cache_of_rows(len(rows), layer, start) if start else None
        inputs = continuing(model.hf_model, branch, start, tokens)
        inputs |= {"use_cache": start > 0, "input_ids": tokens} | self._logits
        # Upstream's torch ops pad to chunks of 64 tokens: four times the work for the 17 of a substitution test.
        backend: Backend | None = "recurrence" if tokens.device.type == "cpu" and stop - start < 64 else None
        plans = (*self._outer_plans, plan)
        edited = scope(model.attachment, plans=plans, first_token=start, backend=backend)
        passing = model.attachment.passing(layer, None, residual)
        with threads_for(tokens.numel() * self._weights), edited, passing, model.hooks(fwd_hooks):
            logits = model.hf_model(**inputs).logits
        plan.check_acted()
        return logits

    def _cache_of_rows(self, rows: int, layer: int, start: int) -> Cache:
        """The cache after ``start`` tokens, repeated for ``rows`` rows; of blocks below ``layer`` once."""
        mixers = self.model.attachment.mixers
        heard = any(mixer.hooks.listens("hook_pattern") for mixer in mixers.values())  # a pattern is of every token
        if self._held is None or heard:
            branch = self._walked_cache(layer, start, anew=heard)
        else:
            branch = cut(self._held, start)
            for recurrent in mixers:
                if recurrent >= layer:
                    state = self._state_at(recurrent, start)
                    put_state(branch, recurrent, state, self._value_first[recurrent])
        index = torch.zeros(rows, dtype=torch.long, device=self.tokens.device)
        for cache_layer in branch.layers[layer:]:  # batch_repeat_interleave raises on linear layers; this knows both
            cache_layer.reorder_cache(cast(torch.LongTensor, index))
        return branch

    def _state_at(self, layer: int, start: int) -> Tensor:
        """[1,H,K,V] of a layer after ``start`` tokens of the plain pass, from where runs began last."""
        before, state = self._states.get(layer, (0, None))
        if before > start:  # states cannot be walked back: from the first token again
            before = 0
            state = None
        if state is None or before < start:
            passed = self.recurrence(layer).select(tokens=slice(before, start), initial_state=state)
            state = passed.states(positions=-1)[:, 0]
            self._states[layer] = (start, state)
        return state

    def _walked_cache(self, layer: int, start: int, anew: bool) -> Cache:
        """The cache of one row after ``start`` tokens from a pass; blocks below ``layer`` are only shared."""
        before, cache = self._prefix if self._prefix[0] <= start and not anew else (0, None)
        self._prefix = 0, None  # half advanced, if interrupted
        if before < start:
            tokens = self.tokens[:, before:start]
            inputs = continuing(self.model.hf_model, cache, before, tokens)
            with threads_for(tokens.numel() * self._weights), scope(self.model.attachment, plans=self._outer_plans):
                cache = cache_of(self.model.hf_model(input_ids=tokens, logits_to_keep=1, **inputs))
        self._prefix = start, cache
        # Only blocks that run write to their part of the cache; the others may share it.
        branch = copy.copy(cast(Cache, cache))
        branch.layers = [*branch.layers[:layer], *copy.deepcopy(branch.layers[layer:])]
        return branch


def run_alone(
    model: HookedModel,
    tokens: Tensor,
    row: EditRow,
    stop: int | None = None,
    batch_size: int = 64,
    gradients: bool = False,
    apart: bool = True,
) -> EditedRun:
    """What a session of ``tokens`` [1,T] runs for this one row, in one pass from the first token on: a plain pass would
    serve no other row. Arguments and errors are those of `EditSession.run`."""
    tokens = _one_sequence(model, tokens)
    plan = EditPlan.for_rows([row])
    start, stop = _checked_stretch(model, tokens, plan, stop, batch_size)
    if not gradients:
        _refuse_trained((*current(model.attachment).plans, plan))
    with torch.set_grad_enabled(gradients and torch.is_grad_enabled()), scope(model.attachment, (plan,)):
        logits = model.hf_model(input_ids=tokens[:, :stop], use_cache=False).logits
    plan.check_acted()
    return EditedRun(logits[:, start:], start, stop)


def _one_sequence(model: HookedModel, tokens: Tensor) -> Tensor:
    """One sequence [1,T] on the model's device."""
    tokens = as_tokens(tokens)
    if tokens.ndim != 2 or tokens.shape[0] != 1:
        raise EditError(f"a session is about one sequence [1,T], got tokens of shape {list(tokens.shape)}")
    check_tokens(tokens, model.cfg)
    return tokens.to(model.cfg.device)


def _checked_stretch(
    model: HookedModel, tokens: Tensor, plan: EditPlan, stop: int | None, batch_size: int
) -> tuple[int, int]:
    """The first edited position of all rows, and the end of the run."""
    model.check_edits(plan)
    edits = plan.all()
    if not edits:
        raise EditError("run needs at least one edit; the unedited logits are session.logits")
    length = tokens.shape[1]
    stop = length if stop is None else stop
    if not 1 <= stop <= length or batch_size < 1:
        raise EditError(
            f"stop must be between 1 and {length}, the length of the sequence, and batch_size at "
            f"least 1; got {stop} and {batch_size}"
        )
    positions = [edit.position or 0 for edit in edits]
    last = max(positions)
    if last >= stop:
        raise EditError(f"position {last} is outside the stretch that is run, which ends at {stop}")
    return min(positions), stop


def _refuse_trained(plans: Sequence[EditPlan]) -> None:
    """Raise EditError where a pass without gradients would lose those that someone trains by."""
    if torch.is_grad_enabled() and any(_is_trained(factor) for plan in plans for factor in plan.factors()):
        raise EditError(
            "keys or values of an edit require a gradient, which runs of a session have with gradients=True only; "
            "ask for it, or detach them"
        )


def _recording_cache(model: HookedModel) -> Cache | None:
    """An empty cache whose convolutions keep all that they are given; None where there is no such cache."""
    caches = cast(list[Cache], [*model.attachment.new_cache().values()])
    cache = caches[0] if caches else DynamicCache(config=model.hf_model.config)
    if is_fla(model.hf_model) or not hasattr(cache, "activate_past_recording"):
        return None
    cache.activate_past_recording()
    return cache


def _has_all(cache: Cache, record: dict[int, Recorded], tokens: int) -> bool:
    """Whether the ``cache`` of the plain pass can be cut at every token, and its states follow from the factors."""
    try:
        attention_of(cache, tokens)
        states = {layer: state_of(cache, layer, recorded.value_first) for layer, recorded in record.items()}
    except UnsupportedModelError:
        return False
    lengths = {x.shape[-1] for place, x in tensors_of(cache).items() if "/conv_states/" in place}
    return lengths <= {tokens} and all_left(record, states)
