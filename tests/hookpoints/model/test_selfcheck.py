"""The self-check: what it refuses, what it tells, and models whose caches must count their tokens."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from test_model_types import by_hand
from tiny_models import make_hf
from torch.testing import assert_close

from hookpoints import HookedRecurrent, WriteEdit
from hookpoints.errors import SelfCheckError
from hookpoints.model.inputs import cache_argument, cache_of


@pytest.mark.parametrize("model_type", ["qwen3_5", "kimi_linear"])
@torch.no_grad()
def test_a_model_whose_caches_upstream_cannot_ask_for_a_length_is_run_with_caches_that_count(model_type, tokens):
    hf, tokens = make_hf(model_type, layer_types=["linear_attention"] * 4), tokens[:, :9]
    how = {"max_new_tokens": 3, "do_sample": False}
    plain, generated = hf(tokens, use_cache=False).logits, hf.generate(tokens, use_cache=False, **how)
    model = HookedRecurrent.from_hf(hf, self_check=False)
    assert torch.equal(model(tokens), plain) and torch.equal(model.generate(tokens, **how), generated)
    mask = torch.ones_like(tokens).index_put((torch.tensor(0), torch.arange(3)), torch.tensor(0))  # left padding
    padded = model.generate(tokens, attention_mask=mask, **how)
    assert torch.equal(padded, model.generate(tokens, attention_mask=mask, use_cache=False, **how))
    cache = cache_of(model.hf_model(tokens[:, :4], use_cache=True))
    later = model.hf_model(tokens[:, 4:], use_cache=True, **{cache_argument(hf): cache}).logits
    assert_close(later, plain[:, 4:], rtol=5e-5, atol=5e-5)
    assert model.position_of(cache) == 9
    edit = WriteEdit(3, 0, 5, mode="delete")
    run = model.run_with_edits(tokens[:1], [edit])
    assert_close(run.logits, by_hand(model, tokens[:1], edit)[:, 5:], rtol=5e-5, atol=5e-5)
    assert not torch.equal(run.logits, plain[:1, 5:])


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
