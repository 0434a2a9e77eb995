"""Scopes that close in any order, and that hold when gradient checkpointing computes a layer again."""

from __future__ import annotations

import _thread
import itertools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

import pytest
import torch
from conftest import hooked_in_float64, make_hf

from hookpoints import HookedRecurrent, WriteEdit, attach

WRITE = "blocks.1.mixer.hook_write"
Open = Callable[[HookedRecurrent], AbstractContextManager[object]]
DELETED = WriteEdit(1, 0, 3, mode="delete")


def adding(layer: int) -> WriteEdit:
    return WriteEdit(layer, 1, None, torch.full((8,), 2.0), torch.full((6,), 3.0))


SCOPES: dict[str, Open] = {
    "deleted": lambda model: model.edits(DELETED),
    "added": lambda model: model.edits(adding(0)),
    "hooked": lambda model: model.hooks([(WRITE, lambda write, hook: 2 * write)]),
    "steered": lambda model: model.hooks([("blocks.2.hook_resid_pre", lambda stream, hook: stream + 1)]),
    "recorded": lambda model: model.recording(),
}


@pytest.mark.parametrize("count", [2, 3])
@torch.no_grad()
def test_scopes_close_in_any_order(model, tokens, count):
    """What acts is what the open scopes say, whichever were opened or closed before."""
    tokens = tokens[:1, :9]
    expected: dict[tuple[str, ...], torch.Tensor] = {}
    for length in range(count):
        for names in itertools.permutations(SCOPES, length):
            with ExitStack() as stack:
                for name in names:
                    stack.enter_context(SCOPES[name](model))
                expected[names] = model(tokens)
    for opened in itertools.combinations(SCOPES, count):
        for closed in itertools.permutations(opened):
            scopes = {name: SCOPES[name](model) for name in opened}
            for scope in scopes.values():
                scope.__enter__()
            model(tokens)
            for name in closed:
                scopes.pop(name).__exit__(None, None, None)
                assert torch.equal(model(tokens), expected[tuple(scopes)]), (opened, closed, name)


# -- gradient checkpointing


def checkpointed(hf, use_reentrant: bool) -> None:
    enable = "activation_checkpointing_enable"  # older versions have the other name alone
    getattr(hf, enable if hasattr(hf, enable) else "gradient_checkpointing_enable")({"use_reentrant": use_reentrant})


def trained_edit(values: torch.Tensor) -> WriteEdit:
    return WriteEdit(1, 0, None, torch.ones(8, dtype=values.dtype), values)


GRADIENTS: dict[str, Callable[[HookedRecurrent, torch.Tensor], list[AbstractContextManager[object]]]] = {
    "edits": lambda model, values: [model.edits([trained_edit(values), DELETED])],
    "hooks": lambda model, values: [
        model.hooks(
            [
                (WRITE, lambda write, hook: 2 * write),
                ("blocks.0.mixer.hook_k", lambda k, hook: k * torch.linspace(0.5, 1.5, k.shape[-1]).to(k)),
                ("blocks.2.mixer.heads.1.hook_state", lambda state, hook: state + values.mean()),
                ("blocks.1.hook_mlp_out", lambda out, hook: 0.5 * out),
            ]
        )
    ],
    "both": lambda model, values: [
        model.edits(trained_edit(values)),
        model.hooks([(WRITE, lambda write, hook: 2 * write)]),
        model.edits(DELETED),
    ],
}


def gradients_of(model: HookedRecurrent, tokens: torch.Tensor, kind: str, inside: bool) -> list[torch.Tensor]:
    parameters = dict(model.hf_model.named_parameters())
    values = torch.linspace(-1.0, 1.0, 6, dtype=model.cfg.dtype, requires_grad=True)
    model.hf_model.zero_grad()
    with ExitStack() as stack:
        for scope in GRADIENTS[kind](model, values):
            stack.enter_context(scope)
        loss = model(tokens, return_type="loss")
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    found = [values, *(parameter for parameter in parameters.values() if parameter.requires_grad)]
    return [torch.zeros_like(x) if x.grad is None else x.grad.clone() for x in found]


@pytest.mark.parametrize("kind", GRADIENTS)
def test_gradient_checkpointing_gives_the_same_gradients(tokens, kind):
    """With scopes open in the backward pass or closed before it, whichever way torch computes layers again."""
    model = hooked_in_float64("qwen3_5")
    model.hf_model.train()
    expected = gradients_of(model, tokens[:, :40], kind, inside=False)
    assert float(expected[0].abs().max()) > 0 or kind == "hooks"
    for use_reentrant, inside in itertools.product([True, False], [True, False]):
        checkpointed(model.hf_model, use_reentrant)
        found = gradients_of(model, tokens[:, :40], kind, inside)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        assert not any(point.fwd_hooks for point in model.hook_dict.values())


@pytest.mark.parametrize("model_type", ["mamba2", "falcon_h1", "kimi_linear"])
def test_gradient_checkpointing_of_other_families(model_type, tokens):
    model = HookedRecurrent.from_hf(make_hf(model_type))
    model.hf_model.train()

    def gradients() -> list[torch.Tensor]:
        model.hf_model.zero_grad()
        with model.edits(WriteEdit(0, 0, None, mode="delete")), model.hooks([("blocks.1.hook_resid_pre", double)]):
            loss = model(tokens[:, :40], return_type="loss")
        loss.backward()
        return [p.grad.clone() for p in model.hf_model.parameters() if p.grad is not None]

    def double(stream: torch.Tensor, hook: object) -> torch.Tensor:
        return 2 * stream

    expected = gradients()
    for use_reentrant in (True, False):
        checkpointed(model.hf_model, use_reentrant)
        torch.testing.assert_close(gradients(), expected, rtol=1e-4, atol=1e-6)


def test_detaching_leaves_checkpointing_as_it_was(tokens):
    hf = make_hf().train()
    checkpointed(hf, use_reentrant=False)
    before = [module.__dict__.get("_gradient_checkpointing_func") for module in hf.modules()]
    with attach(hf) as hooked, hooked.edits(DELETED):
        hf(tokens, labels=tokens).loss.backward()
        assert [module.__dict__.get("_gradient_checkpointing_func") for module in hf.modules()] != before
    assert [module.__dict__.get("_gradient_checkpointing_func") for module in hf.modules()] == before


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_scopes_that_are_opened_before_the_backward_pass_do_not_reach_what_is_computed_again(tokens, use_reentrant):
    """Not in a thread without a context either, as those are in which autograd runs on a GPU."""
    model = HookedRecurrent.from_hf(make_hf())
    model.hf_model.train()

    def gradients(in_thread: bool) -> list[torch.Tensor]:
        model.hf_model.zero_grad()
        with model.edits(DELETED):
            loss = model(tokens[:, :40], return_type="loss")
        done = threading.Event()
        with model.hooks([(WRITE, lambda write, hook: 0 * write)]), model.edits(adding(0)):
            if in_thread:
                _thread.start_new_thread(lambda: (loss.backward(), done.set()), ())
                assert done.wait(60)
            else:
                loss.backward()
        return [parameter.grad.clone() for parameter in model.hf_model.parameters() if parameter.grad is not None]

    expected = gradients(in_thread=False)
    checkpointed(model.hf_model, use_reentrant)
    for in_thread in (False, True):
        torch.testing.assert_close(gradients(in_thread), expected, rtol=1e-4, atol=1e-6)
