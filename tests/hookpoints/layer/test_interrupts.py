"""An interrupt (Ctrl-C, "stop" in a notebook) leaves nothing behind; at calls of any run: ``tests/reliability``."""

from __future__ import annotations

import contextlib
import sys

import pytest
import torch
import transformers.models.qwen3_5.modeling_qwen3_5 as upstream
from conftest import make_hf
from reliability.checks import same
from reliability.runs import EDITS, WRITE, fresh, generated, interrupt, native, outputs, some_tokens

from hookpoints import attach


@pytest.fixture(scope="module")
def expected():
    return some_tokens(), outputs(fresh(), some_tokens())


def test_from_a_hook(expected):
    tokens, alone = expected
    model = fresh()
    for name in (WRITE, "blocks.2.hook_resid_pre", "blocks.3.attn.hook_z", "blocks.0.mixer.hook_q"):
        with pytest.raises(KeyboardInterrupt):
            model.run_with_hooks(tokens, fwd_hooks=[(name, interrupt)])
    with pytest.raises(KeyboardInterrupt), model.edits(EDITS), model.hooks([(WRITE, interrupt)]):
        model(tokens, stop_at_layer=2)
    assert same(alone, outputs(model, tokens))


def test_from_the_op(expected, monkeypatch):
    tokens, alone = expected
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        with monkeypatch.context() as patch:
            model = fresh()
            patch.setattr(upstream, name, interrupt)
            for run in (native, generated):
                with contextlib.suppress(KeyboardInterrupt):
                    run(model, tokens)
        assert same(alone, outputs(model, tokens))


@torch.no_grad()
def test_as_a_scope_has_just_been_entered(expected):
    """Its generator waits at its ``yield``, and the traceback, which a notebook keeps, holds it there."""
    tokens, alone = expected
    model = fresh()

    def profile(frame, event, arg):
        if event == "c_return" and arg is next and frame.f_code.co_name == "__enter__":
            raise KeyboardInterrupt

    sys.setprofile(profile)
    try:
        with model.edits(EDITS):
            pass
    except KeyboardInterrupt as error:
        kept = error
    finally:
        sys.setprofile(None)
    assert same(alone, outputs(model, tokens)) and kept.__traceback__ is not None


def test_a_plain_model_of_the_same_type_is_not_changed(expected):
    tokens, alone = expected
    hf = make_hf()
    with attach(hf) as hooked_model:
        with pytest.raises(KeyboardInterrupt):
            hooked_model.run_with_hooks(tokens, fwd_hooks=[(WRITE, interrupt)])
        with torch.no_grad():
            assert torch.equal(hf(tokens).logits, alone["native"])
            assert torch.equal(make_hf()(tokens).logits, alone["native"])
