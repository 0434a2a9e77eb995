"""Hook points grown onto a Hugging Face model that someone holds: PyTorch hooks for vectors, mixers for matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from hookpoints.errors import HookpointsError, UnsupportedModelError
from hookpoints.fla import ModelScope, is_fla
from hookpoints.hooks.points import BlockHooks, HookSet, MixerHooks, is_listening, watch
from hookpoints.layer import context as run
from hookpoints.layer.intercept import wrap_ops
from hookpoints.layer.mixer import Backend, HookedMixer
from hookpoints.model.layout import BlockLayout, find_layout
from hookpoints.rules import Rule


class StopForward(Exception):
    """Raised inside a forward pass to end it at a block; carries the residual stream [B,T,D] that enters the block."""

    def __init__(self, residual: Tensor):
        super().__init__("forward stopped at a block")
        self.residual = residual


class _Input(NamedTuple):
    """Where a module's input tensor sits in its call."""

    value: Tensor
    replaced: Callable[[Tensor], tuple[tuple[Any, ...], dict[str, Any]]]


class MixerAttachment:
    """Hook points on recurrent mixers alone; ``detach()`` takes them off again. Inert while nobody listens.

    Args:
        model: what is run as a whole; its passes are counted.
    """

    def __init__(self, model: nn.Module):
        self.mixers: dict[int, HookedMixer] = {}
        self.passes = 0
        """Forward passes of the model so far."""
        self._handles: list[Any] = [model.register_forward_pre_hook(self._count)]
        if is_fla(model):
            self._handles.append(ModelScope(model))
        self.attached = True

    def require(self) -> None:
        """Raise HookpointsError after ``detach``: hooks would never fire again, and silently so."""
        if not self.attached:
            raise HookpointsError("the hook points were taken off this model (detach); attach to it again")

    def detach(self) -> None:
        """Remove every PyTorch hook that was set."""
        self.attached = False
        for handle in self._handles:
            handle.remove()
        for mixer in self.mixers.values():
            mixer.detach()

    def attach_mixer(self, layer: int, rule: Rule, namespace: ModuleType, mixer: nn.Module, backend: Backend) -> None:
        """Take over the op calls of one mixer. ``namespace`` is where it looks its ops up."""
        wrap_ops(namespace, rule)
        self.mixers[layer] = HookedMixer(self, layer, rule, mixer, backend)

    def landmarks(self) -> list[nn.Module]:
        """Modules whose outputs every gradient passes that passes any hook point."""
        return [mixer.module for mixer in self.mixers.values()]

    def _count(self, _module: nn.Module, _args: Any) -> None:
        self.passes += 1


class Attachment(MixerAttachment):
    """Hook points on mixers and on the residual stream of a Hugging Face model.

    Args:
        model: a Hugging Face causal language model.
        root: the module that gets the tree of hook points as ``hook_embed``, ``blocks`` and ``ln_final``; they are
            looked up there at each pass, so that an SAE put in the place of a hook point is met.
        backend: who computes the native pass of recurrent layers.

    Raises:
        UnsupportedModelError: the model has no recurrence that can be hooked.
    """

    def __init__(self, model: nn.Module, root: nn.Module, backend: Backend = "auto"):
        self.layout = find_layout(model)
        super().__init__(model)
        self._root = root
        self._returns: dict[int, tuple[str | None, ...] | None] = {}
        """By block that ran: None where it returns the residual stream itself; where it returns a tuple that begins
        with it, for each further entry the argument that the block hands on there (fla's hand on the cache)."""
        root.hook_embed = HookPoint()
        root.blocks = nn.ModuleList()
        root.ln_final = self._final = HookSet(["hook_normalized"])
        try:
            for layer, block in enumerate(self.layout.blocks):
                root.blocks.append(self._attach_block(layer, block, backend))
        except BaseException:
            self.detach()  # a model that is refused is left as it was
            raise
        self._on_output(self.layout.embed, self._fire_embed)
        self._on_output(self.layout.final_norm, lambda x: self._final.fire("hook_normalized", x))

    def landmarks(self) -> list[nn.Module]:
        """See ``MixerAttachment.landmarks``: the embedding, every block, and the final norm."""
        return [self.layout.embed, *(block.block for block in self.layout.blocks), self.layout.final_norm]

    @contextmanager
    def passing(self, start: int, stop: int | None, residual: Tensor | None) -> Iterator[None]:
        """Skip blocks below ``start``, feed ``residual`` [B,T,D] into it, and stop before block ``stop``."""
        if start > 0 and self.layout.first_block_feeds_all:
            raise UnsupportedModelError(
                f"a run cannot start at layer {start} of this model: its first block makes values that all others "
                "take. HookedRecurrent.from_pretrained loads RWKV-7 checkpoints in a class that can"
            )
        with ExitStack() as stack:
            for layer, block in enumerate(self.layout.blocks[:start]):
                stack.enter_context(replaced_forward(block.block, self._passing_through(layer, block.block)))
            if residual is not None:
                stack.enter_context(_pre_hook(self.layout.blocks[start].block, lambda _: residual))
            if stop is not None and stop < len(self.layout.blocks):
                stack.enter_context(_pre_hook(self.layout.blocks[stop].block, _stop))
            stack.enter_context(run.scope(self, start_layer=start))
            yield

    # -- vectors

    def _attach_block(self, layer: int, block: BlockLayout, backend: Backend) -> BlockHooks:
        hooks: MixerHooks | None = None
        if block.rule is not None and block.namespace is not None and block.mixer is not None:
            self.attach_mixer(layer, block.rule, block.namespace, block.mixer, backend)
            hooks = self.mixers[layer].hooks
        outputs = {"hook_mixer_out": block.mixer_out, "hook_attn_out": block.attn_out, "hook_mlp_out": block.mlp_out}
        absent = [name for name, added in outputs.items() if added is None]
        block_hooks = BlockHooks(hooks, block.attn_heads is not None, absent)

        def fire(name: str, scale: float = 1.0) -> Callable[[Tensor], Tensor]:
            def through(value: Tensor) -> Tensor:
                # A skipped block only hands its input on.
                if run.current(self).start_layer > layer or not block_hooks.listens(name):
                    return value
                if scale == 1.0:
                    return block_hooks.fire(name, value)
                seen = watch(value * scale, lambda x: block_hooks.fire(name, x))
                # The difference, so that what a hook leaves as it is stays bit-identical.
                return value + (seen.value - value * scale) / scale if seen.changed else value

            return through

        def fire_heads(n: int) -> Callable[[Tensor], Tensor]:
            def through(value: Tensor) -> Tensor:
                hooks: Any = block_hooks.attn
                if not hooks.listens("hook_z"):
                    return value
                return hooks.fire("hook_z", value.unflatten(-1, (n, -1))).flatten(-2)

            return through

        self._on_input(block.block, fire("hook_resid_pre"))
        if block.attn_heads is not None:
            self._on_input(block.attn_heads.projection, fire_heads(block.attn_heads.n))
        for name, added in outputs.items():
            if added is not None:
                self._on_output(added.module, fire(name, added.scale))
        self._on_output(block.block, fire("hook_resid_post"))
        self._handles.append(
            block.block.register_forward_hook(
                lambda _m, _a, kw, output: self._learn(layer, kw, output), with_kwargs=True
            )
        )
        return block_hooks

    def _learn(self, layer: int, kwargs: dict[str, Any], output: Any) -> None:
        if not isinstance(output, tuple):
            self._returns[layer] = None
            return
        known = self._returns.get(layer) or (None,) * (len(output) - 1)
        names = [next((k for k, v in kwargs.items() if v is not None and v is entry), None) for entry in output[1:]]
        self._returns[layer] = tuple(new or old for new, old in zip(names, known, strict=True))

    def _passing_through(self, layer: int, block: nn.Module) -> Callable[..., Any]:
        """Stands in for a block's forward: hands its input on, in the form in which the block returns it."""
        original = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if layer not in self._returns:  # nothing ran yet
                self._learn(layer, kwargs, original(*args, **kwargs))
            value, handed_on = _input_of(args, kwargs).value, self._returns[layer]
            return value if handed_on is None else (value, *[kwargs.get(name) if name else None for name in handed_on])

        return forward

    def _fire_embed(self, value: Tensor) -> Tensor:
        point: Any = self._root.hook_embed
        return point(value) if is_listening(point) and run.current(self).start_layer == 0 else value

    def _on_output(self, module: nn.Module, through: Callable[[Tensor], Tensor]) -> None:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            value = output[0] if isinstance(output, tuple) else output
            result = through(value)
            if result is value:
                return None
            return (result, *output[1:]) if isinstance(output, tuple) else result

        self._handles.append(module.register_forward_hook(hook))

    def _on_input(self, module: nn.Module, through: Callable[[Tensor], Tensor]) -> None:
        self._handles.append(_register_input(module, through))


def _register_input(module: nn.Module, through: Callable[[Tensor], Tensor]) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = _input_of(args, kwargs)
        result = through(found.value)
        return None if result is found.value else found.replaced(result)

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Input:
    if args and isinstance(args[0], Tensor):
        return _Input(args[0], lambda x: ((x, *args[1:]), kwargs))
    name = "hidden_states" if "hidden_states" in kwargs else next(k for k, v in kwargs.items() if isinstance(v, Tensor))
    return _Input(kwargs[name], lambda x: (args, {**kwargs, name: x}))


@contextmanager
def _pre_hook(module: nn.Module, through: Callable[[Tensor], Tensor]) -> Iterator[None]:
    handle = _register_input(module, through)
    # A residual that is fed in must be there before the block's own hooks see its input.
    module._forward_pre_hooks.move_to_end(handle.id, last=False)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        handle.remove()


def _stop(value: Tensor) -> Tensor:
    raise StopForward(value)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The module's ``forward`` exchanged for the length of the scope (accelerate may have set one on the instance)."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward  # some modules (TransformerLens') hand attributes that are set to others
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before
