"""Scopes close in any order, and are refused where gradient checkpointing would leave them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

import pytest
import torch
from tiny_models import make_hf

from hookpoints import HookedRecurrent, UnsupportedModelError, WriteEdit, attach

DELETED = WriteEdit(1, 0, 3, mode="delete")
SCOPES: dict[str, Callable[[HookedRecurrent], AbstractContextManager[object]]] = {
    "deleted": lambda model: model.edits(DELETED),
    "hooked": lambda model: model.hooks([("blocks.1.mixer.hook_write", lambda write, hook: 2 * write)]),
    "recorded": lambda model: model.recording(),
}


@torch.no_grad()
def test_scopes_close_in_any_order(model, tokens):
    """What acts is what the open scopes say, whichever were opened or closed before."""
    tokens, expected = tokens[:1, :9], {}
    for names in [names for length in range(3) for names in itertools.permutations(SCOPES, length)]:
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(SCOPES[name](model))
            expected[names] = model(tokens)
    for closed in itertools.permutations(SCOPES):
        scopes = {name: SCOPES[name](model) for name in SCOPES}
        for scope in scopes.values():
            scope.__enter__()
        model(tokens)
        for name in closed:
            scopes.pop(name).__exit__(None, None, None)
            assert torch.equal(model(tokens), expected[tuple(scopes)]), (closed, name)


def test_gradient_checkpointing_is_refused_in_scopes_and_left_alone_without(tokens):
    """Layers are computed again when the scope is closed: silently, gradients would be those of another model."""
    hf = make_hf().train()
    enable = "activation_checkpointing_enable"  # older versions have the other name alone
    getattr(hf, enable if hasattr(hf, enable) else "gradient_checkpointing_enable")()
    with attach(hf) as hooked:
        for scope in (hooked.edits(DELETED), hooked.hooks([("blocks.0.hook_resid_pre", lambda x, hook: x)])):
            with pytest.raises(UnsupportedModelError, match="gradient_checkpointing"), scope:
                pass
        hf(tokens, labels=tokens).loss.backward()
        with torch.no_grad(), hooked.edits(DELETED):
            hf(tokens)
