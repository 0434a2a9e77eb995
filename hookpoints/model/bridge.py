"""Does a TransformerBridge compute what its Hugging Face model does? Measured when it is attached."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from hookpoints.errors import BridgeWarning
from hookpoints.model.selfcheck import relative_error, tolerance
from hookpoints.scopes import scoped

_NEW = 3
"""Tokens decoded to compare cached passes: the first comes from the prompt, the others from the cache."""


class Bypassed(NamedTuple):
    """Recurrent layers whose bridge component does not call their op."""

    layer_class: str
    """Upstream's class."""
    error: str
    """What the component raised; empty where it runs, past the op."""
    hooks: list[str]
    """TransformerLens' hooks that cannot fire while attached."""


def check_bridge(bridge: TransformerBridge, tokens: Tensor, dtype: torch.dtype, bypassed: Bypassed | None) -> None:
    """Warn (BridgeWarning) where the bridge differs from the model without the bridge, and what attaching changed.

    Three measurements over a handful of tokens [1,T]: one pass, the bridge's own cached ``generate``, and that of the
    bridged Hugging Face model. Costs some ten passes.
    """
    differences = [] if bypassed is None else [_attaching_changed(bypassed)]
    if not bridge.compatibility_mode:
        with torch.no_grad():
            differences += _differences(bridge, tokens, tolerance(dtype))
    if differences:
        versions = ", ".join(f"{name} {version(name)}" for name in ("transformer-lens", "transformers"))
        warnings.warn(f"TransformerBridge ({versions}): {'; '.join(differences)}", BridgeWarning, stacklevel=6)


def _attaching_changed(bypassed: Bypassed) -> str:
    state = f"fails here ({bypassed.error})" if bypassed.error else "does not call the recurrent op"
    such = f", such as {bypassed.hooks[0]}," if bypassed.hooks else ""
    return (
        f"its own forward of {bypassed.layer_class} {state}, so while hookpoints is attached these layers run "
        f"upstream's, and TransformerLens' hooks inside them{such} cannot fire"
    )


def _differences(bridge: TransformerBridge, tokens: Tensor, allowed: float) -> Iterator[str]:
    model = bridge.original_model

    def plain(ids: Tensor) -> Tensor:
        with without_bridge(model):
            return model(ids).logits

    def one_pass() -> float:
        return relative_error(plain(tokens), bridge(tokens))

    def decoding(generate: Callable[[], Any]) -> float:
        out = generate()
        return relative_error(plain(out.sequences)[:, tokens.shape[1] - 1 : -1], torch.stack(list(out.logits), 1))

    def bridge_generates() -> Any:
        options = {"do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
        return bridge.generate(tokens, max_new_tokens=_NEW, output_logits=True, **options)

    def model_generates() -> Any:
        options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        generate = cast(Callable[..., Any], model.generate)
        return generate(tokens, max_new_tokens=_NEW, min_new_tokens=_NEW, **options)

    yield from _unequal("a pass over a prompt", one_pass, allowed)
    yield from _unequal("bridge.generate with a cache", lambda: decoding(bridge_generates), allowed)
    yield from _unequal("the bridged model's own generate", lambda: decoding(model_generates), allowed)


def _unequal(what: str, measure: Callable[[], float], allowed: float) -> Iterator[str]:
    try:
        error = measure()
    except Exception as raised:  # a bridge that does not fit this transformers may raise anything
        yield f"{what} fails ({type(raised).__name__}: {raised})"
        return
    if not error <= allowed:
        yield f"{what} gives other logits than the Hugging Face model (relative RMS {error:.1e}): do not use it"


@scoped
def without_bridge(model: nn.Module) -> Iterator[None]:
    """The Hugging Face model as it was before a bridge put its components in: they are swapped out for this scope."""
    swapped = list(_components(model))
    for parent, name, component in swapped:
        parent._modules[name] = _original(component)
    try:
        yield
    finally:
        for parent, name, component in reversed(swapped):
            parent._modules[name] = component


def _components(module: nn.Module) -> Iterator[tuple[nn.Module, str, GeneralizedComponent]]:
    """Bridge components in the tree, with the module that holds each and its name there."""
    seen: set[int] = set()

    def walk(parent: nn.Module) -> Iterator[tuple[nn.Module, str, GeneralizedComponent]]:
        if id(parent) in seen:
            return
        seen.add(id(parent))
        for name, child in list(parent._modules.items()):
            if isinstance(child, GeneralizedComponent):
                yield parent, name, child
                child = _original(child)
            if child is not None:
                yield from walk(child)

    yield from walk(module)


def _original(component: nn.Module | None) -> nn.Module | None:
    while isinstance(component, GeneralizedComponent):
        component = component._modules["_original_component"]
    return component
