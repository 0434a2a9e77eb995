"""Hook points grown onto a Hugging Face model that someone holds, by wrapping the ``forward`` of its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hookpoints.errors import HookpointsError, UnsupportedModelError
from hookpoints.fla.scope import is_fla, wrap_model
from hookpoints.hooks.points import BlockHooks, HookSet, MixerHooks, Point, fire, is_listening, through_hook
from hookpoints.layer.attention import hook_pattern
from hookpoints.layer.call import HookedMixer, hook_layer, hook_projection
from hookpoints.layer.context import (
    Backend,
    CountingCache,
    StopForward,
    cache_among,
    count_pass,
    current,
    position_of,
    scope,
)
from hookpoints.layer.intercept import Function, Needed, in_torch, wrap_attention, wrap_forward, wrap_ops
from hookpoints.model.inputs import cache_argument
from hookpoints.model.layout import out_projection
from hookpoints.scopes import scoped

if TYPE_CHECKING:
    from hookpoints.model.layout import BlockLayout, ModelLayout

Through = Callable[[Tensor], Tensor]


class Attachment:
    """Hook points on a Hugging Face model; ``detach()`` takes them off again. Inert with no hooks attached.

    Args:
        model: a causal language model. Its passes are counted, and the position of their first token is read from the
            cache before any layer advances it.
        layout: where its parts are.
        root: the module that gets the tree of hook points as ``hook_embed``, ``blocks`` and ``ln_final``; they are
            looked up there at each pass, so that an SAE that replaces a hook point is met.
        backend: who computes the native pass of recurrent layers.
    """

    def __init__(self, model: nn.Module, layout: ModelLayout, root: nn.Module, backend: Backend = "auto"):
        self.mixers: dict[int, HookedMixer] = {}
        self.attached = True
        self.counts_tokens = False
        """Whether new caches are of the class ``CountingCache``: upstream asks for a length, which its own lack."""
        self.layout = layout
        self._model = model
        self._root = root
        self.undo = ExitStack()
        """What takes everything off the model again."""
        root.hook_embed = Point()
        root.blocks = nn.ModuleList()
        try:
            if layout.backbone is not None and layout.backbone is not model:
                self.undo.callback(wrap_forward(layout.backbone, self._run_backbone))
            self.undo.callback(wrap_forward(model, self._run_model))
            if is_fla(model):
                self.undo.callback(wrap_model(model))
            for layer, block in enumerate(self.layout.blocks):
                root.blocks.append(self._attach_block(layer, block, backend))
            self._wrap_value(self.layout.embed, self._fire_embed)
            if layout.final_norm is not None:
                root.ln_final = final = _FinalNorm(layout.final_norm)
                self._wrap_value(layout.final_norm, partial(final.fire, "hook_normalized"), final.listeners.exist)
        except BaseException:
            self.detach()  # a model that is refused is left as it was
            raise

    def require(self) -> None:
        """Raise HookpointsError after ``detach``: hooks would never fire again, and silently so."""
        if not self.attached:
            raise HookpointsError("the hook points were taken off this model (detach); attach to it again")

    def detach(self) -> None:
        """Take everything off the model that was put on it."""
        self.attached = False
        self.undo.close()

    def landmarks(self) -> list[nn.Module]:
        """Modules whose outputs every gradient passes that passes any hook point: the embedding, every block, and the
        final norm."""
        ends = [self.layout.embed] if self.layout.final_norm is None else [self.layout.embed, self.layout.final_norm]
        return [*ends, *(block.block for block in self.layout.blocks)]

    def require_one_forward(self) -> None:
        """Raise UnsupportedModelError where gradient checkpointing would compute layers again in the backward pass,
        outside of the scopes of their forward pass: gradients would be those of another model."""
        if (
            self._model.training
            and torch.is_grad_enabled()
            and getattr(self._model, "is_gradient_checkpointing", False)
        ):
            raise UnsupportedModelError(
                "scoped hooks and edits do not reach layers that gradient checkpointing computes again: call "
                "gradient_checkpointing_disable() on the model, or set hooks with add_hook"
            )

    def new_cache(self) -> dict[str, object]:
        """An empty cache as an argument of the model, where upstream cannot make one that serves; else none."""
        if not self.counts_tokens:
            return {}
        return {cache_argument(self._model): CountingCache(config=cast(PreTrainedConfig, self._model.config))}

    def _run_model(self, forward: Function, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        count_pass(self)
        if self.counts_tokens and kwargs.get("use_cache") and cache_among(*args, *kwargs.values()) is None:
            kwargs = kwargs | self.new_cache()
        position = current(self).first_token
        if position is None:
            position = position_of(cache_among(*args, *kwargs.values()))
        with scope(self, in_pass=True, position=position):
            return forward(*args, **kwargs)

    def _run_backbone(self, forward: Function, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        if current(self).in_pass:
            return forward(*args, **kwargs)
        return self._run_model(forward, args, kwargs)

    @scoped
    def passing(self, start: int, stop: int | None, residual: Tensor | None) -> Iterator[None]:
        """In this scope passes skip blocks below ``start``, feed ``residual`` [B,T,D] into it (None: what it is given)
        and end before block ``stop`` by raising StopForward.

        Raises:
            UnsupportedModelError: a run of this model cannot start above its first block, or end before its last.
        """
        if (start != 0 or stop not in (None, len(self.layout.blocks))) and not self.layout.is_chain:
            raise UnsupportedModelError(
                "a run cannot start or stop at a layer of this model: its blocks are no chain along one residual "
                "stream [B,T,D] that is known here. Run the whole model; hooks of its mixers fire there"
            )
        if start != 0 and self.layout.first_block_feeds_all:
            raise UnsupportedModelError(
                f"a run cannot start at layer {start} of this model: its first block makes values that all others "
                "take. HookedRecurrent.from_pretrained loads RWKV-7 checkpoints in a class that can"
            )
        stop = None if stop == len(self.layout.blocks) else stop
        with scope(self, start_layer=start, stop_layer=stop, residual=residual):
            yield

    # -- vectors

    def _attach_block(self, layer: int, block: BlockLayout, backend: Backend) -> BlockHooks:
        # The recurrent mixer: its ops are rebound where it looks them up, and its forward says which layer calls.
        mixer_hooks: MixerHooks | None = None
        if block.rule is not None and block.namespace is not None and block.mixer is not None:
            alone = in_torch(block.namespace, block.rule)
            out = out_projection(block.mixer)
            mixer = HookedMixer(self, layer, block.rule, block.mixer, out, backend, alone)
            self.mixers[layer] = mixer
            mixer_hooks = mixer.hooks
            self.undo.callback(wrap_ops(block.namespace, block.rule))
            # Attention layers, where there are any, tell how many tokens a cache holds.
            counts = len(self.mixers) == 1 and all(block.rule is not None for block in self.layout.blocks)
            self.undo.callback(hook_layer(mixer, counts))
            self.undo.callback(hook_projection(mixer))
        outputs = {"hook_mixer_out": block.mixer_out, "hook_attn_out": block.attn_out, "hook_mlp_out": block.mlp_out}
        absent = [name for name, added in outputs.items() if added is None]
        if not self.layout.is_chain:
            absent += ["hook_resid_pre", "hook_resid_post"]
        # Softmax attention, and what each part adds to the stream: values of modules.
        of_attention = [value.hook for value in block.attn_values]
        if block.attn_namespace is not None:
            of_attention.append("hook_pattern")
        hooks = BlockHooks(mixer_hooks, of_attention, absent)
        needed = hooks.listeners.exist
        for name, module, entering, split, scale in block.attn_values:
            self._wrap_value(module, through_hook(hooks.attn, name, scale, split), needed, entering)
        if block.attn_namespace is not None:
            self.undo.callback(wrap_attention(block.attn_namespace))
            self.undo.callback(hook_pattern(block.block, hooks.attn))
        for name, added in outputs.items():
            if added is not None:
                self._wrap_value(added.module, through_hook(hooks, name, added.scale), needed)
        # The stream between blocks last, so that a block which is skipped meets none of the above.
        if self.layout.is_chain:
            around = _BlockRun(self, layer, hooks)
            self.undo.callback(wrap_forward(block.block, around, around.needed))
        return hooks

    def _fire_embed(self, value: Tensor) -> Tensor:
        point = cast(nn.Module, self._root.hook_embed)
        run = current(self)
        if run.embedded is not None:
            return run.embedded
        if is_listening(point) and run.start_layer == 0:
            return fire(point, "hook_embed", value)
        return value

    def _wrap_value(
        self, module: nn.Module, through: Through, needed: Needed | None = None, entering: bool = False
    ) -> None:
        """Put ``through`` on what the module returns, or on what is ``entering`` it."""

        def around(forward: Function, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
            if not entering:
                return _changed_output(forward(*args, **kwargs), through)
            entered = _Input.of(args, kwargs)
            args, kwargs = entered.replaced(through(entered.value))
            return forward(*args, **kwargs)

        self.undo.callback(wrap_forward(module, around, needed))


class _FinalNorm(HookSet):
    """Hook points of the final norm; called, it is that norm."""

    norm: nn.Module

    def __init__(self, norm: nn.Module):
        super().__init__(["hook_normalized"])
        self.__dict__["norm"] = norm  # past nn.Module, which would register it as a part of the hooks

    def forward(self, residual: Tensor) -> Tensor:
        return self.norm(residual)


@dataclass(eq=False)
class _BlockRun:
    """Stands around a block's forward: hooks of the residual stream, and where partial runs start and stop."""

    owner: object
    layer: int
    hooks: BlockHooks
    returns: tuple[str | None, ...] | Literal["unknown"] | None = "unknown"
    """In which form the block returns the residual stream, known once it ran: None for itself; for a tuple that begins
    with it, for each further entry the argument that the block hands on there (fla's hand on the cache)."""

    def needed(self) -> bool:
        """Whether a forward of the block is to be met: for its hooks, a partial run, or to learn what it returns."""
        return self.returns is not None or self.hooks.listeners.exist() or current(self.owner).partial

    def __call__(self, forward: Function, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        run = current(self.owner)
        entering = _Input.of(args, kwargs)
        if self.layer < run.start_layer:
            return self._handed_on(forward, args, kwargs, entering.value)
        value = entering.value
        if self.layer == run.start_layer and run.residual is not None:
            value = run.residual
        if self.layer == run.stop_layer:
            raise StopForward(value)
        if self.hooks.listens("hook_resid_pre"):
            value = self.hooks.fire("hook_resid_pre", value)
        args, kwargs = entering.replaced(value)
        output = forward(*args, **kwargs)
        self._learn_returns(kwargs, output)
        if self.hooks.listens("hook_resid_post"):
            output = _changed_output(output, lambda x: self.hooks.fire("hook_resid_post", x))
        return output

    def _handed_on(
        self, forward: Function, args: tuple[object, ...], kwargs: dict[str, object], value: Tensor
    ) -> object:
        """The block's input, in the form in which the block returns its output."""
        if self.returns == "unknown":  # nothing ran yet
            self._learn_returns(kwargs, forward(*args, **kwargs))
        further = self.returns if isinstance(self.returns, tuple) else None
        if further is None:
            return value
        return (value, *[kwargs.get(name) if name else None for name in further])

    def _learn_returns(self, kwargs: dict[str, object], output: object) -> None:
        if not isinstance(output, tuple):
            self.returns = None
            return
        known = self.returns if isinstance(self.returns, tuple) else (None,) * (len(output) - 1)
        # By identity: a block may return arguments that it was given, such as the values of the first layer.
        name_of = {id(value): name for name, value in reversed(kwargs.items()) if value is not None}
        names = [name_of.get(id(entry)) for entry in output[1:]]
        self.returns = tuple(new or old for new, old in zip(names, known, strict=True))


def _changed_output(output: object, through: Through) -> object:
    """A module's output, a tensor or a tuple that begins with one, with that tensor changed."""
    if isinstance(output, tuple):
        changed = through(output[0])
        if changed is output[0]:
            return output
        return (changed, *output[1:])
    return through(cast(Tensor, output))


class _Input(NamedTuple):
    """A module's first tensor argument, and how to call the module with another one."""

    value: Tensor
    replaced: Callable[[Tensor], tuple[tuple[object, ...], dict[str, object]]]

    @classmethod
    def of(cls, args: tuple[object, ...], kwargs: dict[str, object]) -> _Input:
        if args and isinstance(args[0], Tensor):
            return cls(args[0], lambda x: ((x, *args[1:]), kwargs))
        tensors = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
        name = "hidden_states" if "hidden_states" in tensors else next(iter(tensors))
        return cls(tensors[name], lambda x: (args, {**kwargs, name: x}))
