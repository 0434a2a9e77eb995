"""Many edits of one sequence: the plain pass runs once, and each edited run branches off where it first differs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from transformers import Cache

from hookpoints.edits.edit import EditPlan, EditRow
from hookpoints.errors import EditError, UnsupportedModelError
from hookpoints.layer.context import Backend, current, scope
from hookpoints.model.hooked import HookedModel
from hookpoints.model.inputs import as_tokens, cache_argument, cache_of, check_tokens, position_inputs
from hookpoints.recurrence.recurrence import Recurrence
from hookpoints.scopes import threads_for


class EditedRun(NamedTuple):
    """Logits of N edited runs of one sequence, from the first edited position on (before it nothing differs)."""

    logits: Tensor
    """[N, stop-start, vocab]; row n is the run with the n-th entry of ``rows``."""
    start: int
    """First edited position."""
    stop: int
    """End of the stretch, exclusive."""


def _is_trained(factor: Tensor) -> bool:
    """Whether ``factor`` is itself what an optimiser would change; factors that were computed have a graph whenever
    the model's weights do, which asks for nothing."""
    origin = factor if factor._base is None or factor._base.numel() != factor.numel() else factor._base
    return origin.requires_grad and origin.is_leaf


def _entering(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_pre"


class EditSession:
    """The plain pass over one sequence, kept, so that edited runs cost only what differs.

    A run with edits at layer l and position t recomputes tokens t.. of blocks l.. for each row, from the residual
    stream that the plain pass left below l and a copy of its cache at t. Calls with rising positions reuse the cache.
    Of Mamba-1, whose op for several tokens begins without a cache, it recomputes all tokens.
    Edits in force when the session is made are part of its plain pass, and of every run. Not for use by several
    threads at once: each makes its own session.

    Args:
        model: the hooked model.
        tokens: [1,T].
    """

    def __init__(self, model: HookedModel, tokens: Tensor):
        tokens = as_tokens(tokens, model.cfg.device)
        if tokens.ndim != 2 or tokens.shape[0] != 1:
            raise EditError(f"a session is about one sequence [1,T], found tokens of shape {list(tokens.shape)}")
        check_tokens(tokens, model.cfg)
        self.model, self.tokens = model, tokens
        self._outer_plans = current(model.attachment).plans
        names = [name for layer in model.cfg.recurrent_layers if (name := _entering(layer)) in model.hook_dict]
        self._weights = sum(weight.numel() for weight in model.hf_model.parameters())
        with torch.no_grad(), threads_for(tokens.numel() * self._weights), model.recording() as self._record:
            self.logits, cache = model.run_with_cache(tokens, names_filter=names)
        """[1,T,vocab] logits of the plain pass."""
        self._residual = {name: cache[name] for name in names}
        self._prefix: Cache | None = None
        self._prefix_length = 0
        self._cache_name = cache_argument(model.hf_model)

    def recurrence(self, layer: int) -> Recurrence:
        """Canonical factors of a recurrent layer in the plain pass."""
        self.model.cfg.layer(layer)
        return self._record[layer].recurrence

    def residual(self, layer: int) -> Tensor:
        """[1,T,D] residual stream entering a recurrent block in the plain pass."""
        self.model.cfg.layer(layer)
        if not self.model.attachment.layout.is_chain:
            raise UnsupportedModelError("the blocks of this model are no chain along one residual stream that is known")
        return self._residual[_entering(layer)]

    def run(
        self, rows: Sequence[EditRow], stop: int | None = None, batch_size: int = 64, gradients: bool = False
    ) -> EditedRun:
        """Run the sequence once per entry of ``rows``.

        Args:
            rows: one WriteEdit, several, or none (``[]``: the unedited run, for a baseline with the same arithmetic).
            stop: run up to this position, exclusive; None: to the end.
            batch_size: rows at once; memory grows with batch_size * (stop - start) * vocab.
            gradients: give logits that can be differentiated, by keys and values of edits and by whatever else a pass
                depends on. Each row is then a whole pass, since what the plain pass left has no graph, and the
                activations of all rows are kept (fewer with ``hf_model.requires_grad_(False)``).

        Raises:
            EditError: an edit does not fit the model or lies outside the sequence, there is none at all, or one has a
                tensor that is being trained though there will be no ``gradients``.
        """
        plan = EditPlan.for_rows(rows)
        self.model.check_edits(plan)
        edits = plan.all()
        if not edits:
            raise EditError("run needs at least one edit; the unedited logits are session.logits")
        stop = self.tokens.shape[1] if stop is None else stop
        if not 1 <= stop <= self.tokens.shape[1] or batch_size < 1:
            raise EditError(
                f"stop must be between 1 and {self.tokens.shape[1]}, the length of the sequence, and batch_size at "
                f"least 1; found {stop} and {batch_size}"
            )
        start = min(edit.position or 0 for edit in edits)
        last = max(edit.position or 0 for edit in edits)
        if last >= stop:
            raise EditError(f"position {last} is outside the stretch that is run, which ends at {stop}")
        batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        if gradients:
            logits = [self._run_batch(batch, 0, 0, stop, None)[:, start:] for batch in batches]
            return EditedRun(torch.cat(logits), start, stop)
        factors = (factor for each in (*self._outer_plans, plan) for factor in each.factors())
        if torch.is_grad_enabled() and any(_is_trained(factor) for factor in factors):
            raise EditError(
                "keys or values of an edit require a gradient, which runs of a session have with gradients=True only; "
                "ask for it, or detach them"
            )
        layout = self.model.attachment.layout
        layer = min(plan.by_layer) if layout.is_chain and not layout.first_block_feeds_all else 0
        from_zero = any(mixer.rule.starts_from_zero for mixer in self.model.attachment.mixers.values())
        begin = 0 if from_zero else start
        residual = self._residual.get(_entering(layer))
        residual = None if residual is None else residual[:, begin:stop]
        with torch.no_grad():
            logits = [self._run_batch(batch, layer, begin, stop, residual)[:, start - begin :] for batch in batches]
        return EditedRun(torch.cat(logits), start, stop)

    def _run_batch(self, rows: Sequence[EditRow], layer: int, start: int, stop: int, residual: Tensor | None) -> Tensor:
        """Logits [N,stop-start,vocab] of a pass that begins with ``residual`` [1,stop-start,D] at block ``layer``."""
        model, plan = self.model, EditPlan.for_rows(rows)
        tokens = self.tokens[:, start:stop].expand(len(rows), -1)
        inputs: dict[str, object] = {"use_cache": False}
        if start > 0:
            inputs = {self._cache_name: self._branch(len(rows), layer, start), "use_cache": True}
        inputs |= position_inputs(model.hf_model, torch.arange(start, stop, device=tokens.device).expand_as(tokens))
        # Tokens, not the residual stream: some models hand the embeddings to later blocks again.
        inputs["input_ids"] = tokens
        # Upstream's torch ops pad to chunks of 64 tokens: four times the work for the 17 of a substitution test.
        backend: Backend | None = "recurrence" if tokens.device.type == "cpu" and stop - start < 64 else None
        with (
            threads_for(tokens.numel() * self._weights),
            scope(model.attachment, plans=(*self._outer_plans, plan), first_token=start, backend=backend),
            model.attachment.passing(layer, None, None if residual is None else residual.expand(len(rows), -1, -1)),
        ):
            logits = model.hf_model(**inputs).logits
        plan.check_acted()
        return logits

    def _branch(self, rows: int, layer: int, start: int) -> Cache:
        """The cache after ``start`` tokens, repeated for ``rows`` rows; blocks below ``layer`` are only shared."""
        self._advance(start)
        index = torch.zeros(rows, dtype=torch.long, device=self.tokens.device)
        branch = copy.copy(self._prefix)
        assert branch is not None
        shared, copied = branch.layers[:layer], copy.deepcopy(branch.layers[layer:])
        for cache_layer in copied:  # batch_repeat_interleave raises on linear layers; this one knows both kinds
            cache_layer.reorder_cache(cast(torch.LongTensor, index))
        branch.layers = [*shared, *copied]
        return branch

    def _advance(self, start: int) -> None:
        """Bring the prefix cache to ``start`` tokens."""
        if start < self._prefix_length:
            self._prefix, self._prefix_length = None, 0
        if start == self._prefix_length:
            return
        inputs: dict[str, object] = {} if self._prefix is None else {self._cache_name: self._prefix}
        where = torch.arange(self._prefix_length, start, device=self.tokens.device).unsqueeze(0)
        prefix_length, self._prefix, self._prefix_length = self._prefix_length, None, 0  # half advanced, if interrupted
        with threads_for(where.numel() * self._weights), scope(self.model.attachment, plans=self._outer_plans):
            out = self.model.hf_model(
                input_ids=self.tokens[:, prefix_length:start],
                use_cache=True,
                logits_to_keep=1,
                **inputs,
                **position_inputs(self.model.hf_model, where),
            )
        self._prefix, self._prefix_length = cache_of(out), start
