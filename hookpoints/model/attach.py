"""attach(): hook points on a model that someone already holds, for as long as they are wanted."""

from __future__ import annotations

from torch import nn
from transformer_lens.model_bridge import TransformerBridge

from hookpoints.errors import HookpointsError
from hookpoints.layer.context import Backend
from hookpoints.model import selfcheck
from hookpoints.model.attachment import Attachment
from hookpoints.model.bridge import AttachedBridge
from hookpoints.model.config import describe
from hookpoints.model.hooked import Attached, HookedModel
from hookpoints.model.layout import find_layout


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
            ``reset_hooks`` know the hooks of the recurrent mixers besides their own (see ``hookpoints.model.bridge``).
        backend: as for ``HookedRecurrent.from_pretrained``.
        self_check: run a few tokens and prove that hooks see what the model does.

    Raises:
        UnsupportedModelError: the model has no recurrence of the canonical form; says why.
        SelfCheckError: the model does not behave as hooks need. It is left as it was.
    """
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
