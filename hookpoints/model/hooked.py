"""What every hooked model offers, however it was made: scoped hooks, caches, edits; unknown names and silence raise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformer_lens import ActivationCache, HookedRootModule
from transformer_lens.hook_points import HookPoint

from hookpoints.edits.edit import EditPlan, EditRow
from hookpoints.errors import EditError
from hookpoints.hooks.cache import CachingHooks, reachable
from hookpoints.hooks.guard import FiringWatch, check_names
from hookpoints.layer import context as run
from hookpoints.model.config import HookedRecurrentConfig

Hooks = Sequence[tuple[str | Callable[[str], bool], Callable[..., Any]]]


class HookedModel(HookedRootModule):
    """TransformerLens' hooking methods over an attachment. Subclasses say what a forward pass is."""

    hf_model: Any
    """The Hugging Face (or fla) model inside; it stays as it is."""
    attachment: Any
    """The ``MixerAttachment`` that puts the hook points on it."""
    cfg: HookedRecurrentConfig

    def setup(self) -> None:
        """Name the hook points. The Hugging Face model's own modules are left out, and untouched."""
        self.mod_dict: dict[str, nn.Module] = {}
        self.hook_dict: dict[str, HookPoint] = {}
        for name, module in self.named_modules():
            if name and name.split(".")[0] != "hf_model":
                module.name = name  # type: ignore[assignment]
                self.mod_dict[name] = module
                if isinstance(module, HookPoint):
                    self.hook_dict[name] = module

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[Any]:
        """TransformerLens' scoped hooks; unknown names raise, and so does a hook that did not fire though a pass ran.

        Raises:
            UnknownHookError: a name that this model lacks (names the nearest), or a filter that matches nothing.
            HookDidNotFireError: the model ran inside the scope and a forward hook never fired, or a backward pass ran
                and a backward hook never did.
        """
        self.attachment.require()
        for name, _ in (*fwd_hooks, *bwd_hooks):
            check_names(self, name)
        watch = FiringWatch(self.hook_dict, fwd_hooks, bwd_hooks)
        passes = self.attachment.passes
        with (
            watch.backward(self.attachment.landmarks()),
            super().hooks(list(watch.fwd_hooks), list(watch.bwd_hooks), reset_hooks_end, clear_contexts),
        ):
            yield self
        watch.check(ran=self.attachment.passes > passes)

    def add_hook(self, name: str | Callable[[str], bool], hook: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """TransformerLens' ``add_hook`` (stays until ``reset_hooks``); raises UnknownHookError as ``hooks`` does."""
        self.attachment.require()
        check_names(self, name)
        super().add_hook(name, hook, *args, **kwargs)

    def run_with_cache(  # type: ignore[override]
        self,
        *args: Any,
        names_filter: Any = None,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ActivationCache | dict[str, Tensor]]:
        """Run and keep activations. Matrix hooks (writes, states) are kept only if named: they are K*V numbers a token.

        Args:
            names_filter: a name, a list of names, a predicate on names, or None for every vector hook.
            kwargs: those of TransformerLens' ``run_with_cache`` and of ``forward``.
        """
        if isinstance(names_filter, str) or (names_filter is not None and not callable(names_filter)):
            for name in [names_filter] if isinstance(names_filter, str) else names_filter:
                check_names(self, name)
        chosen = reachable(names_filter, kwargs.get("start_at_layer"), kwargs.get("stop_at_layer"), self.cfg.n_layers)
        out, cache = super().run_with_cache(*args, names_filter=chosen, remove_batch_dim=remove_batch_dim, **kwargs)
        if not return_cache_object:
            return out, cache
        return out, ActivationCache(cache, self, has_batch_dim=not remove_batch_dim)  # type: ignore[arg-type]

    def get_caching_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens' caching hooks, with the time axis where these activations have it (axis 1)."""
        return CachingHooks(self.hook_dict).build(*args, **kwargs)

    @contextmanager
    def edits(self, edits: EditRow) -> Iterator[Any]:
        """While this is open, every pass of the model (all rows) writes as ``edits`` say, in generation too.

        Raises:
            EditError: an edit does not fit the model, or the model ran and an edit never met its token.
        """
        self.attachment.require()
        plan = EditPlan.for_all(edits)
        if not plan.by_layer:
            yield self
            return
        self.check_edits(plan)
        passes = self.attachment.passes
        with run.scope(self.attachment, plan=plan):
            yield self
        idle = plan.idle()
        if idle and self.attachment.passes > passes:
            raise EditError(f"{len(idle)} edit(s) never acted: no pass reached position {idle[0].position}")

    def check_edits(self, plan: EditPlan) -> None:
        """Raise EditError (or UnsupportedModelError for an attention layer) unless every edit fits the model."""
        for edit in plan.all():
            shape = self.cfg.layer(edit.layer)
            edit.check_shape(shape.H, shape.K, shape.V)
