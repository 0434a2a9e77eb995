"""attach(): hook points on a model that someone already holds, for as long as they are wanted."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import nn
from transformer_lens.model_bridge import TransformerBridge

from hookpoints.errors import HookpointsError
from hookpoints.layer import context as run
from hookpoints.layer.mixer import Backend
from hookpoints.model import selfcheck
from hookpoints.model.attachment import Attachment
from hookpoints.model.config import describe
from hookpoints.model.hooked import HookedModel
from hookpoints.recurrence.recurrence import Recurrence


def attach(model: nn.Module, *, backend: Backend = "auto", self_check: bool = True) -> Attached:
    """Put hook points on ``model``: its own ``forward`` and ``generate`` fire them until ``detach()``.

        >>> from hookpoints import attach, loading
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
            ``reset_hooks`` know the hooks of the recurrent mixers besides their own (see ``hookpoints.bridge``).
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
        from hookpoints.model.bridge import AttachedBridge

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
        try:
            self._attach(model, backend)
            self.setup()
            if self_check:
                with selfcheck.in_eval_mode(model):
                    self._self_check()
        except BaseException:
            if hasattr(self, "attachment"):
                self.detach()  # a model that is refused is left as it was
            raise

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward: its arguments, its result."""
        self.attachment.require()
        return self.hf_model(*args, **kwargs)

    def recurrence(self, input: Any, layer: int, **kwargs: Any) -> Recurrence:
        """The canonical factors of a layer on ``input`` (with ``kwargs`` what the model's forward takes)."""
        self.cfg.layer(layer)
        record: dict[int, run.Recorded] = {}
        with run.scope(self.attachment, record=record):
            self(input, **kwargs)
        return record[layer].recurrence

    def run_with_cache(self, *args: Any, incl_bwd: bool = False, **kwargs: Any) -> tuple[Any, Any]:
        """As ``HookedRecurrent.run_with_cache``, with the model's own result. Gradients are had with ``bwd_hooks``."""
        if incl_bwd:
            raise ValueError(
                "incl_bwd needs a model whose forward returns a loss: open hooks(bwd_hooks=...) and call backward() on "
                "the model's own loss, or use HookedRecurrent.from_hf(model)"
            )
        return super().run_with_cache(*args, **kwargs)

    def detach(self) -> None:
        """Take everything off the model. Hooking methods raise from here on."""
        self.attachment.detach()

    def __enter__(self) -> Attached:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _attach(self, model: Any, backend: Backend) -> None:
        self.attachment = Attachment(model, root=self, backend=backend)
        label = getattr(model.config, "_name_or_path", "") or type(model).__name__
        self.cfg = describe(model, self.attachment.layout, label, backend)

    def _self_check(self) -> None:
        selfcheck.self_check(self)
