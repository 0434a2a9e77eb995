"""The pattern of softmax attention, met at the function that computes it (sdpa, eager), which upstream's layers look
up by ``ALL_ATTENTION_FUNCTIONS.get_interface``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from hookpoints.errors import UnsupportedModelError
from hookpoints.hooks.points import HookSet
from hookpoints.layer.intercept import Function, running, wrap_forward


def hook_pattern(block: nn.Module, hooks: HookSet) -> Callable[[], None]:
    """Fire ``hook_pattern`` in every forward of the block; returns what undoes it."""

    def around(forward: Function, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        call = AttentionCall(block, hooks) if hooks.listens("hook_pattern") else None
        if call is None:
            return forward(*args, **kwargs)
        return running(call, forward, args, kwargs)

    return wrap_forward(block, around, hooks.listeners.exist)


class AttentionCall:
    """One forward of a block whose pattern has a hook; it handles the call of the attention function."""

    def __init__(self, block: nn.Module, hooks: HookSet):
        self.module = block
        self.hooks = hooks
        self.open = True
        self.projection = None

    def handle(self, op: Function, arguments: Mapping[str, object]) -> object:
        """Run the function natively; an edit A' of the pattern A moves its outputs, o + (A' - A) v.

        Raises:
            UnsupportedModelError: the function takes masks of another form.
        """
        pattern = _attention_pattern(arguments)
        outputs, *weights = cast(tuple[Tensor, ...], op(**arguments))
        # A copy: a hook may write into what it is given, and the difference below needs the pattern as it was.
        fired, changed = self.hooks.watch("hook_pattern", pattern.clone())
        if changed:
            value = cast(Tensor, arguments["value"])
            # Of grouped queries: H heads read from fewer heads of values.
            values = value.repeat_interleave(pattern.shape[1] // value.shape[1], 1)
            outputs = outputs + ((fired - pattern) @ values).transpose(1, 2)
        return (outputs, *weights)


def _attention_pattern(arguments: Mapping[str, object]) -> Tensor:
    """[B,H,T,S] by the plain function of the layer's own family, which knows its scale, groups, caps and sinks."""
    module = arguments["module"]
    query = arguments["query"]
    key = arguments["key"]
    mask = arguments["attention_mask"]
    assert isinstance(module, nn.Module) and isinstance(query, Tensor) and isinstance(key, Tensor)
    if (function := getattr(module.config, "_attn_implementation", None)) not in ("sdpa", "eager"):
        raise UnsupportedModelError(
            f"hook_pattern needs attention by sdpa or eager, got {function!r}: call "
            "model.set_attn_implementation('sdpa') on the transformers model"
        )
    if mask is None and function == "sdpa" and query.shape[2] > 1:
        mask = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()  # sdpa's is_causal
    hidden = ~mask if isinstance(mask, Tensor) and mask.dtype == torch.bool else None
    if hidden is not None:
        mask = query.new_zeros(hidden.shape).masked_fill(hidden, torch.finfo(query.dtype).min)
    plain: Callable[..., tuple[Tensor, Tensor]] = sys.modules[type(module).__module__].eager_attention_forward
    _, pattern = plain(**{**arguments, "attention_mask": mask, "dropout": 0.0})
    # Of padding, which sees no token, sdpa makes zeros and the plain function a mean over all.
    return pattern if hidden is None else pattern.masked_fill(hidden, 0)
