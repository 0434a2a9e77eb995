"""A hooked recurrent mixer: a layer, its update rule and its hook points."""

from __future__ import annotations

from torch import nn

from hookpoints.errors import UnsupportedModelError
from hookpoints.hooks.points import MixerHooks
from hookpoints.layer.context import Backend
from hookpoints.rules.base import Rule


class HookedMixer:
    """What is known of one recurrent layer. It holds nothing of a call (see ``call.LayerCall``), so threads share it.

    Args:
        owner: the attachment; runs of other hooked models do not concern this one.
        layer: block index.
        backend: who computes the native pass.

    Raises:
        UnsupportedModelError: the layer calls the rule's op but does not name its sizes as the rule's layers do.
    """

    def __init__(self, owner: object, layer: int, rule: Rule, module: nn.Module, backend: Backend):
        try:
            heads, _, _ = rule.head_shape(module)
        except AttributeError as error:
            raise UnsupportedModelError(
                f"{type(module).__name__} (layer {layer}) calls {rule.ops[0]}, but does not name its sizes as layers "
                f"of {rule.name} do: {error}"
            ) from error
        self.owner, self.layer, self.rule, self.module = owner, layer, rule, module
        self.backend: Backend = backend
        self.hooks = MixerHooks(heads, rule.factor_names)
        self.calls = 0
        """Op calls so far; the self-check reads it."""
