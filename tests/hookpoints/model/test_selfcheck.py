"""The self-check: what it refuses, what it tells, and models whose caches must count their tokens."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from tiny_models import MAKERS, make_hf

from hookpoints import HookedRecurrent, WriteEdit
from hookpoints.errors import SelfCheckError
from hookpoints.model.inputs import cache_argument, cache_of

ALL_RECURRENT = {"layer_types": ["linear_attention"] * 4}


@pytest.mark.parametrize("model_type", [name for name in ("qwen3_5", "qwen3_next", "kimi_linear") if name in MAKERS])
@torch.no_grad()
def test_a_model_whose_caches_upstream_cannot_ask_for_a_length_is_run_with_caches_that_count(model_type, tokens):
    hf, tokens = make_hf(model_type, **ALL_RECURRENT), tokens[:, :9]
    how = {"max_new_tokens": 3, "do_sample": False}
    plain, generated = hf(tokens, use_cache=False).logits, hf.generate(tokens, use_cache=False, **how)
    model = HookedRecurrent.from_hf(hf, self_check=False)
    assert torch.equal(model(tokens), plain)
    mask = torch.ones_like(tokens).index_put((torch.tensor(0), torch.arange(3)), torch.tensor(0))  # left padding
    for given in ({}, {"attention_mask": mask}):
        without = model.generate(tokens, use_cache=False, **given, **how)
        assert torch.equal(model.generate(tokens, **given, **how), without)
    assert torch.equal(model.generate(tokens, **how), generated)
    cache = cache_of(model.hf_model(tokens[:, :4], use_cache=True))
    later = model.hf_model(tokens[:, 4:], use_cache=True, **{cache_argument(hf): cache}).logits
    torch.testing.assert_close(later, plain[:, 4:], rtol=5e-5, atol=5e-5)
    assert model.position_of(cache) == 9
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


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1.001), (torch.bfloat16, 1.5), (torch.float16, 1.1)])
def test_self_check_refuses_a_wrong_formula(monkeypatch, dtype, factor):
    """Outputs are off by this factor: more than the rounding of the dtype."""
    from hookpoints.rules import Rule

    def form(self, f, arguments):
        true = true_form(self, f, arguments)
        return true.replace(scale=factor * true.scale)

    HookedRecurrent.from_hf(make_hf().to(dtype))
    true_form = Rule.form
    monkeypatch.setattr(Rule, "form", form)
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    with pytest.raises(SelfCheckError, match=rf"layer 0 .*differ by.*{re.escape(versions)}"):
        HookedRecurrent.from_hf(make_hf().to(dtype))


def test_upstreams_own_difference_is_told():
    """Nemotron-H clamps dt in prefill and not in decoding; hooks and edits hold in both."""
    with pytest.warns(UserWarning, match="apart in decoding"):
        HookedRecurrent.from_hf(make_hf("nemotron_h", time_step_min=0.05))
