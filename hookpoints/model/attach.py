"""attach(): hook points on a model that someone already holds, for as long as they are wanted."""

from __future__ import annotations

import warnings
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from hookpoints.errors import BridgeWarning, HookpointsError
from hookpoints.layer.context import Backend
from hookpoints.layer.intercept import Function, wrap_forward
from hookpoints.model import selfcheck
from hookpoints.model.attachment import Attachment
from hookpoints.model.hooked import HookedModel
from hookpoints.model.layout import find_layout
from hookpoints.model.refused import check_forward_arguments
from hookpoints.model.wrappers import unwrap

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent


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

    The model is neither wrapped, copied nor set to another mode, and nothing stays on it after the block (or
    ``detach()``). Everything that ``HookedRecurrent`` offers on top, tokens, weights, partial runs and edit sessions,
    needs ``HookedRecurrent.from_hf(model)``.

    Args:
        model: a causal language model of transformers or flash-linear-attention, or a TransformerLens
            ``TransformerBridge`` (see ``AttachedBridge``). What ``torch.compile``, DistributedDataParallel, PEFT or
            nnsight puts around a model is looked through: hooks fire when the wrapper runs.
        backend: as for ``HookedRecurrent.from_pretrained``.
        self_check: run a few tokens and prove that hooks see what the model does.

    Raises:
        UnsupportedModelError: the model has no recurrence of the canonical form, or hooks inside of its wrapper would
            not act; says why.
        SelfCheckError: the model does not behave as hooks need. It is left as it was.
    """
    from transformer_lens.model_bridge import TransformerBridge  # takes seconds

    model = unwrap(model)
    if isinstance(model, HookedModel):
        raise HookpointsError(
            f"{type(model).__name__} has hook points already; attach() is for plain models (here: model.hf_model)"
        )
    if isinstance(model, TransformerBridge):
        return AttachedBridge(model, backend=backend, self_check=self_check)
    return Attached(model, backend=backend, self_check=self_check)


class Attached(HookedModel):
    """Hook points on a model that stays its holder's. Made by ``attach``; a context manager that detaches.

    ``hook_dict`` has every hook by name; ``hooks``, ``run_with_hooks``, ``run_with_cache``, ``add_hook``,
    ``reset_hooks`` and ``edits`` are those of ``HookedRecurrent``, with the model's own arguments and results.
    """

    def __init__(self, model: nn.Module, *, backend: Backend = "auto", self_check: bool = True):
        super().__init__()
        self.__dict__["hf_model"] = model  # past nn.Module, which would register it as a part of this one
        with selfcheck.in_eval_mode(model):
            attachment = Attachment(model, find_layout(model), self, backend)
            self._attach_hooks(attachment, None, backend, self._check_model if self_check else None)

    def forward(self, *args: object, **kwargs: object) -> Any:
        """The model's own forward: its arguments, its result.

        Raises:
            InputError: an argument that the model lacks; names the nearest, and the call that takes it.
        """
        self.attachment.require()
        check_forward_arguments(kwargs, self.hf_model)
        return self.hf_model(*args, **kwargs)

    def detach(self) -> None:
        """Take everything off the model. Hooking methods raise from here on."""
        self.attachment.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _check_model(self) -> None:
        selfcheck.self_check(self)


class AttachedBridge(Attached):
    """Hook points on the model that a TransformerBridge holds. Made by ``attach``.

    They are those of the recurrent mixers, of blocks and of both ends: ``hooks`` and ``edits`` of this object act
    wherever the bridge runs, and its ``run_with_cache`` and ``run_with_hooks`` run the bridge. The bridge's own methods
    know its own hooks alone, as without hookpoints.

    Warns:
        BridgeWarning: TransformerLens computes layers by a copy of their forward (Gated DeltaNet), which does not call
            the op. While attached they run upstream's, so that TransformerLens' hooks inside them do not fire.
    """

    bridge: TransformerBridge

    def __init__(self, bridge: TransformerBridge, *, backend: Backend = "auto", self_check: bool = True):
        self.__dict__["bridge"] = bridge  # past nn.Module, which would register it as a part of this one
        super().__init__(bridge.original_model, backend=backend, self_check=self_check)

    def forward(self, *args: object, **kwargs: object) -> Any:
        """The bridge's own forward: its arguments, its result.

        Raises:
            InputError: an argument that neither the bridge nor its model has; names the nearest.
        """
        self.attachment.require()
        check_forward_arguments(kwargs, self.hf_model, self.bridge.forward)
        return self.bridge(*args, **kwargs)

    def _check_model(self) -> None:
        from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

        tokens = torch.arange(1, 8, device=self.cfg.device).remainder(self.cfg.d_vocab).unsqueeze(0)
        # A copied forward runs only without a cache, and may not fit this version of transformers.
        with suppress(Exception), torch.no_grad(), self.recording():
            self.bridge(tokens, use_cache=False)
        deaf = {id(mixer.module) for mixer in self.attachment.mixers.values() if not mixer.calls}
        for component in self.hf_model.modules():
            if isinstance(component, GeneralizedComponent) and id(component.original_component) in deaf:
                self.attachment.undo.callback(wrap_forward(component, partial(_run_upstreams, component)))
        if deaf:
            name = type(next(iter(self.attachment.mixers.values())).module).__name__
            warnings.warn(
                f"TransformerBridge: its own forward of {name} does not call the recurrent op, so while hookpoints is "
                "attached these layers run upstream's, and TransformerLens' hooks inside them do not fire",
                BridgeWarning,
                stacklevel=5,
            )
        selfcheck.check_prefill(self, tokens)


def _run_upstreams(
    component: GeneralizedComponent, _forward: Function, args: tuple[object, ...], kwargs: dict[str, object]
) -> object:
    """Instead of a component's own forward the general one, which calls the upstream module."""
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    return GeneralizedComponent.forward(component, *args, **kwargs)
