"""What every hooked model offers, however it was made: scoped hooks, caches, edits; unknown names and silence raise."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import Cache

from hookpoints.edits.edit import EditPlan, EditRow, Edits
from hookpoints.errors import EditError, HookpointsError, InputError, OtherModelWarning
from hookpoints.hooks.cache import NamesFilter, Saving, caching_hooks, reachable
from hookpoints.hooks.guard import ADDING, Hook, HookSpecs, Name, find_all_hooks, find_hooks, named_hooks, scoped_hooks
from hookpoints.hooks.late import extend
from hookpoints.layer.context import Backend, Recorded, current, position_of, scope
from hookpoints.memory.sealing import fingerprint
from hookpoints.model.config import HookedRecurrentConfig, describe, device_of
from hookpoints.recurrence.recurrence import Recurrence
from hookpoints.scopes import scoped

if TYPE_CHECKING:
    from transformer_lens import HookedRootModule
    from transformer_lens.hook_points import HookPoint
    from transformer_lens.utilities.slice import Slice, SliceInput

    from hookpoints.model.attachment import Attachment
    from hookpoints.model.cache import RecurrentCache
else:
    HookedRootModule = nn.Module  # until a first model is made


class HookedModel(HookedRootModule):
    """TransformerLens' hooking methods over an attachment. Subclasses say what a forward pass is.

    Threads: scopes (``hooks``, ``edits``, and the runs that open one) hold in the thread that opened them, so several
    threads may use one model, each with its own. A thread started inside a scope is outside of it, unless it runs in
    ``contextvars.copy_context()``. Hooks of ``add_hook`` hold everywhere.

    Scopes and gradient checkpointing of transformers exclude each other: it computes layers again in the backward pass,
    when scopes may be closed. Hooks of ``add_hook`` are called a second time then.
    """

    hf_model: Any
    """The Hugging Face (or fla) model inside; it stays as it is."""
    attachment: Attachment
    """Puts the hook points on it."""
    _cfg: HookedRecurrentConfig

    def __new__(cls, *_: object, **__: object) -> Self:
        extend(HookedModel, "transformer_lens", "HookedRootModule")
        return super().__new__(cls)

    @property
    def cfg(self) -> HookedRecurrentConfig:
        """What the model is. Device and dtype are those that its embedding has now."""
        embed = self.hf_model.get_input_embeddings()
        device = device_of(embed)
        dtype = cast(Tensor, embed.weight).dtype
        if (device, dtype) != (self._cfg.device, self._cfg.dtype):
            self._cfg = replace(self._cfg, device=device, dtype=dtype)
        return self._cfg

    @cfg.setter
    def cfg(self, value: HookedRecurrentConfig) -> None:
        self._cfg = value

    def _attach_hooks(
        self, attachment: Attachment, name: str | None, backend: Backend, check: Callable[[], object] | None
    ) -> None:
        """Name the hook points that ``attachment`` made, and ``check`` them. A model that is refused is left as it
        was."""
        self.attachment = attachment
        try:
            self.cfg = describe(self.hf_model, attachment.layout, name, backend)
            self.setup()
            self.eval()  # hook points too: TransformerLens 4 patches nothing that holds a module in training mode
            if check is not None:
                check()
        except BaseException:
            attachment.detach()
            raise

    def setup(self) -> None:
        """Name the hook points. The Hugging Face model's own modules are left out, and untouched."""
        from transformer_lens.hook_points import HookPoint  # takes seconds

        self.mod_dict: dict[str, nn.Module] = {}
        self.hook_dict: dict[str, HookPoint] = {}
        for name, module in self.named_modules():
            if name and name.split(".")[0] != "hf_model":
                module.name = name  # type: ignore[assignment]
                self.mod_dict[name] = module
                if isinstance(module, HookPoint):
                    self.hook_dict[name] = module

    def __reduce_ex__(self, protocol: object) -> str | tuple[object, ...]:
        raise HookpointsError(
            f"a {type(self).__name__} cannot be copied or pickled, as its hook points sit on one model. Copy or save "
            "model.hf_model (copies carry no hook points) and hook the copy"
        )

    # -- weights

    def fingerprint(self) -> str | None:
        """Names the weights as bfloat16 rounds them: equal in float32 and bfloat16. None where that cannot be told: in
        float16, quantized, or without weights in memory. Cost: a reading of all weights."""
        model = self.hf_model
        unknown = self.cfg.dtype == torch.float16 or getattr(model, "is_quantized", False)
        if unknown or any(parameter.is_meta for parameter in model.parameters()):
            return None
        return fingerprint(model, torch.bfloat16)

    @cached_property
    def _first_fingerprint(self) -> str | None:
        """As it was when a dictionary first came: many calls bring one, and each would read all weights."""
        return self.fingerprint()

    def check_dictionary(self, metadata: object, refuse: bool = False) -> None:
        """Warn (`OtherModelWarning`) where the metadata of a dictionary names other weights (``model_fingerprint``).
        Metadata without a name is in order. Cost: a reading of all weights, once.

        A warning, because a dictionary on a fine-tuned model is a usual experiment.

        Raises:
            InputError: with ``refuse``, as commands do unless ``--other-model`` is given.
        """
        theirs = getattr(metadata, "model_fingerprint", None)
        if theirs is None or self._first_fingerprint in (None, theirs):
            return
        told = (
            f"sae: expected a dictionary of the weights of {self.cfg.model_name}, got one of other weights "
            f"({theirs:.12}); name its model, or take it on this one, fine-tuned say, by --other-model"
        )
        if refuse:
            raise InputError(told)
        warnings.warn(told.partition(";")[0], OtherModelWarning, stacklevel=3)

    # -- hooks

    def check_hook_name(self, name: Name) -> None:
        """Raise UnknownHookError, naming the nearest, unless ``name`` (or predicate) names a hook of this model."""
        find_hooks(self, name)

    @scoped
    def hooks(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        fwd_hooks: HookSpecs = (),
        bwd_hooks: HookSpecs = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[Self]:
        """TransformerLens' scoped hooks; unknown names raise, and so does a hook that did not fire though a pass ran.

        They act in the thread that opened the scope; with ``reset_hooks_end=False`` they stay, and act everywhere.
        What a hook returns is held to its shape and device. NaN is let through: it may be meant, to see what depends on
        a token, and telling it costs a reading of every value.

        Raises:
            UnknownHookError: a name that this model lacks (names the nearest), or a filter that matches nothing.
            InputError: hooks that are no pairs of a name and a function.
            HookDidNotFireError: the model ran inside the scope and a forward hook never fired, or a backward pass ran
                and a backward hook never did.
            UnsupportedModelError: gradient checkpointing would compute layers again outside of the scope.
        """
        self.attachment.require()
        self.attachment.require_one_forward()
        fwd = named_hooks(self, "fwd_hooks", fwd_hooks)
        bwd = named_hooks(self, "bwd_hooks", bwd_hooks)
        marks = self.attachment.landmarks()
        stay = not reset_hooks_end
        with scope(self.attachment) as opened, scoped_hooks(opened, self.mod_dict, marks, fwd, bwd, stay):
            yield self
        if clear_contexts:
            self.clear_contexts()

    def add_hook(self, name: Name, hook: Hook, *args: Any, **kwargs: Any) -> None:
        """TransformerLens' ``add_hook`` (stays until ``reset_hooks``); raises UnknownHookError as ``hooks`` does."""
        self.attachment.require()
        for one in find_hooks(self, name):
            with ADDING:
                super().add_hook(one, cast(Any, hook), *args, **kwargs)

    def run_with_cache(  # type: ignore[override]
        self,
        *args: object,
        names_filter: NamesFilter = None,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, RecurrentCache | dict[str, Tensor]]:
        """Run and keep activations. Matrices (writes, states: K*V numbers a token) and patterns (S numbers a token) are
        cached only if named.

        Args:
            names_filter: a name, a list of names, a predicate on names, or None for every vector hook. An empty list
                keeps nothing, as in TransformerLens.
            kwargs: those of TransformerLens' ``run_with_cache`` and of ``forward``.

        Raises:
            UnknownHookError: a name that this model lacks, or a predicate that matches no hook of the blocks that run.
        """
        names = reachable(names_filter, kwargs.get("start_at_layer"), kwargs.get("stop_at_layer"), self.cfg.n_layers)
        out, cache = super().run_with_cache(*args, names_filter=names, remove_batch_dim=remove_batch_dim, **kwargs)
        from hookpoints.model.cache import RecurrentCache  # extends TransformerLens' class

        cache_object = RecurrentCache(cache, self, has_batch_dim=not remove_batch_dim)
        return out, cache_object if return_cache_object else cache

    def get_caching_hooks(  # type: ignore[override]
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: SliceInput | Slice = None,
    ) -> tuple[dict[str, Tensor], list[tuple[str, Saving]], list[tuple[str, Saving]]]:
        """TransformerLens' caching hooks, with the time axis where these activations have it (axis 1).

        Raises:
            UnknownHookError: a name that this model lacks, or a predicate that matches no hook.
        """
        names = find_all_hooks(self, names_filter)
        return caching_hooks(self.hook_dict, names, incl_bwd, device, remove_batch_dim, cache, pos_slice)

    # -- edits

    @scoped
    def edits(self, edits: Edits = (), *, edit_rows: Sequence[EditRow] | None = None) -> Iterator[Self]:
        """While this is open, every pass of the model writes as the edits say, in generation too.

        Scopes nest: an inner one edits the model as the outer ones edited it. So an inner ``delete`` or ``replace``
        also takes away what an outer scope adds to the same write.

        Args:
            edits: one WriteEdit or several, which all act on every row of the batch.
            edit_rows: for each row of the batch its own edits (one, several, or ``[]``).

        Raises:
            EditError: an edit does not fit the model, the batch has another number of rows than ``edit_rows``, or the
                model ran and an edit never met its token.
        """
        self.attachment.require()
        every = (EditPlan.for_all(edits), EditPlan.for_rows(() if edit_rows is None else edit_rows))
        plans = tuple(plan for plan in every if plan.by_layer)
        for plan in plans:
            self.check_edits(plan)
        with scope(self.attachment, plans) as opened:
            yield self
        for plan in plans if opened.passes else ():
            plan.check_acted()

    def check_edits(self, plan: EditPlan) -> None:
        """Raise EditError (or UnsupportedModelError for an attention layer) unless every edit fits the model and is
        finite."""
        self.attachment.require_one_forward()
        for edit in plan.all():
            shape = self.cfg.layer(edit.layer)
            edit.check_shape(shape.H, shape.K, shape.V)
        if not plan.is_finite():
            raise EditError("keys or values of an edit are NaN or infinite; whatever it wrote would be, too")

    # -- where a pass is

    def position_of(self, cache: Cache | None) -> int | None:
        """Number of tokens in ``cache``, which is the position of the token that continues it; None where nothing
        tells (a cache of recurrent layers alone, filled by a model that was not hooked)."""
        return position_of(cache)

    def first_token(self) -> int | None:
        """Inside a hook: position of the first token of the pass under way, padding included; None where its cache
        does not tell. Raises HookpointsError outside of a pass."""
        run = current(self.attachment)
        if not run.in_pass:
            raise HookpointsError("first_token is known during a pass only: ask for it in a hook")
        return run.position

    @scoped
    def recording(
        self, layers: Container[int] | None = None, *, gradients: bool = False
    ) -> Iterator[dict[int, Recorded]]:
        """The last native op call of each recurrent layer that runs while this is open, by layer.

        Args:
            layers: record these alone; the others run without hooks, and nothing of them is held. None: all.
            gradients: keep the autograd graph of what is recorded, and with it all activations of the pass. Otherwise
                it is detached, as in ``run_with_cache``.
        """
        record: dict[int, Recorded] = {}
        with scope(self.attachment, record=record, recorded=layers, gradients=gradients):
            yield record

    def recurrence(self, input: Any, layer: int, *, gradients: bool = False, **kwargs: Any) -> Recurrence:
        """The canonical factors of a layer on ``input``.

        Args:
            gradients: make them differentiable, by the inputs and weights of the pass. The result then holds the graph
                of the whole pass; otherwise no graph is built.
            kwargs: what the model's forward takes.
        """
        self.cfg.layer(layer)
        with torch.set_grad_enabled(gradients), self.recording([layer], gradients=gradients) as record:
            self(input, **kwargs)
        return record[layer].recurrence
