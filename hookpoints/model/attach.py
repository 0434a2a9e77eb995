"""attach(): hook points on a model that someone already holds, for as long as they are wanted.

A TransformerLens bridge has its own hooks for vectors; the hooks of recurrent mixers, ``blocks.{l}.mixer.`` in
``hooks.table``, are put beside them. While attached, the bridge's ``run_with_cache``, ``run_with_hooks``, ``hooks``,
``add_hook`` and ``reset_hooks`` send each name to whom it belongs; a name that nobody knows raises, where
TransformerLens ignores it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.utilities.slice import Slice, SliceInput

from hookpoints.errors import (
    HookDidNotFireError,
    HookpointsError,
    SelfCheckError,
    UnknownHookError,
    UnsupportedModelError,
    nearest,
)
from hookpoints.hooks.cache import NamesFilter, caching_hooks, reachable
from hookpoints.hooks.guard import Hook, Hooks, Name, NamedHook
from hookpoints.hooks.points import HookSet
from hookpoints.layer.context import Backend
from hookpoints.layer.intercept import Around, wrap_forward
from hookpoints.model import selfcheck
from hookpoints.model.attachment import Attachment, MixerAttachment
from hookpoints.model.bridge import Bypassed, check_bridge
from hookpoints.model.config import describe
from hookpoints.model.hooked import Attached, HookedModel
from hookpoints.model.layout import BlockLayout, ModelLayout, find_layout, rule_of
from hookpoints.model.wrappers import unwrap
from hookpoints.scopes import scoped

_WRAPPED = ("run_with_cache", "run_with_hooks", "hooks", "add_hook", "reset_hooks", "add_sae")
"""Methods of a bridge that are replaced while it is attached. The last one is of SAELens' bridge alone."""


def attach(model: nn.Module, *, backend: Backend = "auto", self_check: bool = True) -> Attached:
    """Put hook points on ``model``: its own ``forward`` and ``generate`` fire them until ``detach()``.

        >>> import torch
        >>> from hookpoints import attach
        >>> from hookpoints.model import loading
        >>> model = loading.load("embedded").model
        >>> tokens = torch.tensor([[5, 6, 7]])
        >>> with attach(model) as hooked:
        ...     out, cache = hooked.run_with_cache(tokens, names_filter="blocks.1.mixer.hook_write")
        ...     with hooked.hooks([("blocks.1.mixer.hook_write", lambda write, hook: 0 * write)]):
        ...         text = model.generate(tokens, max_new_tokens=5)

    The model is neither wrapped, copied nor put in another mode, and nothing stays on it after the block (or
    ``detach()``). Everything that ``HookedRecurrent`` offers on top, tokens, weights, partial runs and edit sessions,
    needs ``HookedRecurrent.from_hf(model)``.

    Args:
        model: a causal language model of transformers or flash-linear-attention, or a TransformerLens
            ``TransformerBridge``: then ``bridge.run_with_cache``, ``run_with_hooks``, ``hooks``, ``add_hook`` and
            ``reset_hooks`` know the hooks of the recurrent mixers besides their own (see ``AttachedBridge``). What
            ``torch.compile``, DistributedDataParallel, PEFT or nnsight puts around a model is looked through: hooks
            fire when the wrapper runs.
        backend: as for ``HookedRecurrent.from_pretrained``.
        self_check: run a few tokens and prove that hooks see what the model does.

    Raises:
        UnsupportedModelError: the model has no recurrence of the canonical form, or hooks inside of its wrapper would
            not act; says why.
        SelfCheckError: the model does not behave as hooks need. It is left as it was.
    """
    model = unwrap(model)
    if isinstance(model, HookedModel):
        raise HookpointsError(
            f"{type(model).__name__} has hook points already; attach() is for plain models (here: model.hf_model)"
        )
    if isinstance(model, TransformerBridge):
        return AttachedBridge(model, backend=backend, self_check=self_check)
    return AttachedModel(model, backend=backend, self_check=self_check)


class AttachedModel(Attached):
    """Hook points on a model of transformers or flash-linear-attention. Made by ``attach``."""

    def __init__(self, model: nn.Module, *, backend: Backend = "auto", self_check: bool = True):
        super().__init__(model)
        layout = find_layout(model)
        self.attachment = Attachment(model, layout, root=self, backend=backend)
        try:
            label = getattr(model.config, "_name_or_path", "") or type(model).__name__
            self.cfg = describe(model, layout, str(label), backend)
            self.setup()
            if self_check:
                with selfcheck.in_eval_mode(model):
                    selfcheck.self_check(self)
        except BaseException:
            self.detach()  # a model that is refused is left as it was
            raise


# -- a TransformerBridge


class _Split(NamedTuple):
    """Hooks, by whom their names belong to."""

    ours: list[NamedHook]
    theirs: list[NamedHook]


class AttachedBridge(Attached):
    """Hook points on the recurrent mixers of a bridge. Made by ``attach``.

    Where TransformerLens computes a recurrent layer by a copy of its forward (Gated DeltaNet), which never calls the
    op, that layer runs upstream's forward while attached: TransformerLens' hooks inside it cannot fire, and setting
    one raises. Its ``hook_in`` and ``hook_out`` stay. A bridge in compatibility mode has other weights on purpose, so
    it is not compared with the Hugging Face model.

    Warns:
        BridgeWarning: the bridge's logits, in one pass or in cached decoding, differ from those of the Hugging Face
            model without the bridge, which is measured here; or hooks of TransformerLens cannot fire.
    """

    attachment: MixerAttachment
    blocks: nn.ModuleList
    bridge: TransformerBridge

    def __init__(self, bridge: TransformerBridge, *, backend: Backend = "auto", self_check: bool = True):
        super().__init__(bridge.original_model)
        self.__dict__["bridge"] = bridge  # past nn.Module, which would register it as a part of this one
        self._scope = ExitStack()
        self._silenced: set[str] = set()
        self.attachment = MixerAttachment(bridge.original_model)
        try:
            self._attach(bridge.original_model, backend)
            self.setup()
            if self_check:
                with selfcheck.in_eval_mode(bridge.original_model):
                    self._self_check()
        except BaseException:
            self.detach()  # a bridge that is refused is left as it was
            raise
        self._theirs = {name: getattr(bridge, name) for name in _WRAPPED if hasattr(bridge, name)}
        for name in self._theirs:
            setattr(bridge, name, getattr(self, f"_bridge_{name}"))

    def forward(self, *args: object, **kwargs: object) -> Any:
        """The bridge's own forward: its arguments, its result."""
        self.attachment.require()
        return self.bridge(*args, **kwargs)

    def detach(self) -> None:
        """Take everything off the bridge. Hooking methods raise from here on."""
        super().detach()
        self._scope.close()
        bridge = self.bridge
        for name in _WRAPPED:
            bridge.__dict__.pop(name, None)

    # -- attaching

    def _attach(self, model: Any, backend: Backend) -> None:
        bridge = self.bridge
        if not isinstance(getattr(bridge, "blocks", None), nn.ModuleList):
            raise UnsupportedModelError("this TransformerBridge has no list of blocks, so its mixers cannot be named")
        layouts = tuple(_mixer_of(block) for block in bridge.blocks)
        if not any(layout.rule for layout in layouts):
            raise UnsupportedModelError("no block of this TransformerBridge has a recurrence that is known here")
        layout = ModelLayout(model.get_input_embeddings(), layouts, bridge.ln_final, bridge.unembed)
        self.cfg = describe(model, layout, str(bridge.cfg.model_name), backend)
        self.blocks = nn.ModuleList()
        for layer, parts in enumerate(layouts):
            block = HookSet([])
            if parts.rule is not None and parts.namespace is not None and parts.mixer is not None:
                self.attachment.attach_mixer(layer, parts.rule, parts.namespace, parts.mixer, backend)
                block.mixer = self.attachment.mixers[layer].hooks
            self.blocks.append(block)

    def _self_check(self) -> None:
        tokens = torch.arange(1, 8, device=self.cfg.device).remainder(self.cfg.d_vocab).unsqueeze(0)
        bypassed = self._call_ops(tokens)
        selfcheck.check_prefill(self, tokens)
        check_bridge(self.bridge, tokens, self.cfg.dtype, bypassed)

    def _call_ops(self, tokens: Tensor) -> Bypassed | None:
        """See to it that every recurrent layer calls its op; says what was done, or None."""
        error = self._run_once(tokens)
        deaf = [mixer.module for mixer in self.attachment.mixers.values() if not mixer.calls]
        components = [c for c in self.hf_model.modules() if isinstance(c, GeneralizedComponent)]
        replaced = [c for c in components if any(c.original_component is mixer for mixer in deaf)]
        for component in replaced:
            self._scope.callback(wrap_forward(component, _plain_forward(component)))
            self._silenced |= self._names_inside(component)
        left = self._run_once(tokens) if replaced else error
        if left:
            raise SelfCheckError(
                f"this TransformerBridge cannot run {type(self.hf_model).__name__} on this version of transformers "
                f"({left}); attach to the Hugging Face model itself instead"
            )
        if not replaced:
            return None
        return Bypassed(type(replaced[0].original_component).__name__, error, sorted(self._silenced))

    def _run_once(self, tokens: Tensor) -> str:
        """One pass of the bridge; what it raised, or an empty string."""
        with torch.no_grad():
            try:
                self(tokens)
            except Exception as raised:  # whatever a bridge that does not fit this transformers may raise
                return f"{type(raised).__name__}: {raised}"
        return ""

    def _names_inside(self, component: GeneralizedComponent) -> set[str]:
        """Names, aliases too, of TransformerLens' hooks between a component's input and its output."""
        edges = (component.hook_in, component.hook_out)
        inside = {id(p) for p in component.modules() if isinstance(p, HookPoint) and p not in edges}
        return {name for name, point in self.bridge.hook_dict.items() if id(point) in inside}

    # -- the bridge's methods while attached

    @scoped
    def _bridge_hooks(
        self, fwd_hooks: Hooks = (), bwd_hooks: Hooks = (), reset_hooks_end: bool = True, clear_contexts: bool = False
    ) -> Iterator[TransformerBridge]:
        fwd, bwd = self._split_hooks(fwd_hooks), self._split_hooks(bwd_hooks)
        with (
            self.hooks(fwd.ours, bwd.ours, reset_hooks_end, clear_contexts),
            self._theirs["hooks"](fwd.theirs, bwd.theirs, reset_hooks_end, clear_contexts),
        ):
            yield self.bridge

    def _bridge_run_with_hooks(
        self,
        input: object,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **kwargs: object,
    ) -> object:
        fwd, bwd = self._split_hooks(fwd_hooks), self._split_hooks(bwd_hooks)
        with self.hooks(fwd.ours, bwd.ours, reset_hooks_end, clear_contexts):
            return self._theirs["run_with_hooks"](
                input, fwd.theirs, bwd.theirs, reset_hooks_end, clear_contexts, **kwargs
            )

    def _bridge_run_with_cache(
        self,
        *args: object,
        names_filter: NamesFilter = None,
        remove_batch_dim: bool = False,
        stop_at_layer: int | None = None,
        incl_bwd: bool = False,
        pos_slice: SliceInput | Slice = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        ours = theirs = names_filter
        if names_filter is not None and not callable(names_filter):
            names = [names_filter] if isinstance(names_filter, str) else list(names_filter)
            ours = [name for name in names if self._is_own(name)]
            theirs = [name for name in names if name not in ours]
        wanted = reachable(ours, None, stop_at_layer, self.cfg.n_layers)
        saved, fwd, bwd = caching_hooks(
            self.hook_dict, wanted, incl_bwd, kwargs.get("device"), remove_batch_dim, pos_slice=pos_slice
        )
        with self.hooks(fwd, bwd):
            out, cache = self._theirs["run_with_cache"](
                *args,
                names_filter=theirs,
                remove_batch_dim=remove_batch_dim,
                stop_at_layer=stop_at_layer,
                incl_bwd=incl_bwd,
                pos_slice=pos_slice,
                **kwargs,
            )
        getattr(cache, "cache_dict", cache).update(saved)
        return out, cache

    def _bridge_add_hook(self, name: Name, hook_fn: Hook, *args: Any, **kwargs: Any) -> None:
        ours, theirs = self._split_hooks([(name, hook_fn)])
        for part, add in ((ours, self.add_hook), (theirs, self._theirs["add_hook"])):
            if part:
                add(name, hook_fn, *args, **kwargs)

    def _bridge_reset_hooks(self, *args: Any, **kwargs: Any) -> None:
        self.reset_hooks(*args, **kwargs)
        self._theirs["reset_hooks"](*args, **kwargs)

    def _bridge_add_sae(self, sae: Any, *args: Any, **kwargs: Any) -> None:
        """Raises where the bridge would go on without the SAE, as it does for a hook that is not its own."""
        name = str(sae.cfg.metadata.hook_name)
        if self._is_own(name):
            raise HookpointsError(
                f"{name} is a hook of hookpoints, and this bridge puts SAEs on its own hooks alone. Load the model as "
                "a HookedSAERecurrent (of sae-lens-writesae), which has SAELens' methods"
            )
        self._theirs["add_sae"](sae, *args, **kwargs)

    # -- whose name is it

    def _split_hooks(self, hooks: Hooks) -> _Split:
        ours: list[NamedHook] = []
        theirs: list[NamedHook] = []
        for name, hook in hooks:
            if not callable(name):
                (ours if self._is_own(name) else theirs).append((name, hook))
                continue
            matching = [
                (part, any(name(one) for one in names))
                for part, names in ((ours, self.hook_dict), (theirs, self.bridge.hook_dict))
            ]
            if not any(matches for _, matches in matching):
                raise UnknownHookError(f"the filter {name!r} matches no hook of the bridge and none of its mixers")
            for part, matches in matching:
                if matches:
                    part.append((name, hook))
        return _Split(ours, theirs)

    def _is_own(self, name: str) -> bool:
        if name in self.hook_dict:
            return True
        bridge = self.bridge
        if name in self._silenced:
            raise HookDidNotFireError(
                f"{name} cannot fire while hookpoints is attached: its layer runs upstream's own forward. Use the "
                f"hooks of blocks.{{l}}.mixer{nearest(name, self.hook_dict)}"
            )
        if bridge.get_hook_point(name) is None and name not in bridge.hook_dict:
            known = [*self.hook_dict, *bridge.hook_dict]
            raise UnknownHookError(f"no hook named {name!r} in this bridge or its mixers{nearest(name, known)}")
        return False


def _plain_forward(component: GeneralizedComponent) -> Around:
    """Instead of a component's own forward the general one, which calls the upstream module."""
    return lambda _forward, args, kwargs: GeneralizedComponent.forward(component, *args, **kwargs)


def _mixer_of(block: nn.Module) -> BlockLayout:
    """The recurrent mixer under a bridge's block, if there is one."""
    for module in block.modules():
        rule = rule_of(module)
        if rule is not None:
            return BlockLayout(block, module, *rule, None, None, None)
    return BlockLayout(block, None, None, None, None, None, None)
