"""The self-check of models that upstream cannot run with a cache."""

from __future__ import annotations

import pytest
import torch
from conftest import MAKERS, make_hf

from hookpoints import HookedRecurrent, UnsupportedModelError, WriteEdit
from hookpoints.errors import SelfCheckError

ALL_RECURRENT = {"layer_types": ["linear_attention"] * 4}


@pytest.mark.parametrize("model_type", [name for name in ("qwen3_5", "qwen3_next", "kimi_linear") if name in MAKERS])
@torch.no_grad()
def test_a_model_that_upstream_cannot_run_with_a_cache_is_checked_and_run_without(model_type, tokens):
    hf, tokens = make_hf(model_type, **ALL_RECURRENT), tokens[:, :9]
    try:
        hf(tokens, use_cache=True)
    except ValueError:
        pass
    else:
        pytest.skip("this version of transformers runs it with a cache")
    plain, generated = (
        hf(tokens, use_cache=False).logits,
        hf.generate(tokens, max_new_tokens=3, do_sample=False, use_cache=False),
    )
    with pytest.warns(UserWarning, match="cannot run it with a cache") as warned:
        model = HookedRecurrent.from_hf(hf)
    assert len(warned) == 1 and torch.equal(model(tokens), plain)
    assert torch.equal(model.generate(tokens, max_new_tokens=3, do_sample=False), generated)
    with pytest.raises(UnsupportedModelError, match="use_cache"):
        model.generate(tokens, max_new_tokens=3, use_cache=True)
    edit = WriteEdit(3, 0, 5, mode="delete")
    with model.edits(edit):
        edited = model(tokens[:1])
    hooked = model.run_with_hooks(tokens[:1], fwd_hooks=[("blocks.3.mixer.heads.0.hook_write", without_token_5)])
    run = model.run_with_edits(tokens[:1], [edit])
    assert not torch.equal(edited[:, 5:], plain[:1, 5:])
    torch.testing.assert_close(run.logits, edited[:, 5:], rtol=5e-5, atol=5e-5)
    torch.testing.assert_close(hooked, edited, rtol=5e-5, atol=5e-5)


def without_token_5(write, hook):
    write[:, 5] = 0
    return write


def test_self_check_refuses_a_wrong_formula(monkeypatch):
    from hookpoints.rules import Rule

    true_form = Rule.form
    monkeypatch.setattr(Rule, "form", lambda self, f, arguments: true_form(self, f, arguments).replace(scale=1.0))
    with pytest.raises(SelfCheckError, match=r"layer 0 .*differ by"):
        HookedRecurrent.from_hf(make_hf())


def test_upstreams_own_difference_is_told():
    """Nemotron-H clamps dt in prefill and not in decoding; hooks and edits hold in both."""
    with pytest.warns(UserWarning, match="apart in decoding"):
        HookedRecurrent.from_hf(make_hf("nemotron_h", time_step_min=0.05))
