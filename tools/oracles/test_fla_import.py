"""fla imported without side effects: transformers' Auto classes and own models are as before."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
import transformers
from fla_models import import_fla, make_fla
from tiny_models import MAKERS, make_hf
from torch.testing import assert_close

from hookpoints import HookedRecurrent, UnsupportedModelError
from hookpoints.fla import importing


def test_it_comes_whole():
    before = transformers.AutoConfig.for_model("mamba2")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fla = import_fla()
    assert fla is import_fla() and fla.models.GLAForCausalLM and fla.layers.GatedLinearAttention
    assert type(transformers.AutoConfig.for_model("mamba2")) is type(before) is transformers.Mamba2Config


@pytest.mark.parametrize("model_type", sorted(MAKERS))
@torch.no_grad()
def test_transformers_own_models_run_hooked(model_type, tokens):
    """With triton and without a GPU transformers binds kernels of fla that cannot run: unhooked, its own models of the
    delta rules stop at "0 active drivers". Hooked, each op's torch form computes the pass."""
    import_fla()
    hooked = HookedRecurrent.from_hf(make_hf(model_type), backend="recurrence")
    expected = hooked(tokens)
    hooked.attachment.detach()
    hooked = HookedRecurrent.from_hf(hooked.hf_model)
    assert_close(hooked(tokens), expected, rtol=0, atol=5e-5)
    out = hooked.generate(tokens, max_new_tokens=2, do_sample=False)
    assert torch.equal(out[:, 70], expected[:, -1].argmax(-1))


@pytest.mark.parametrize("missing", ["fla", "triton"])
def test_what_is_missing_is_named(missing, monkeypatch, tmp_path):
    make_fla("gla").save_pretrained(tmp_path)
    monkeypatch.setattr(importing.importlib.util, "find_spec", lambda name: None if name == missing else name)
    monkeypatch.delitem(sys.modules, "fla.models")
    with pytest.raises(UnsupportedModelError, match={"fla": r"\[fla\]", "triton": "pip install triton"}[missing]):
        HookedRecurrent.from_pretrained(str(tmp_path))


def test_models_without_a_residual_stream_are_refused():
    with pytest.raises(UnsupportedModelError, match="attnres_block_size"):
        HookedRecurrent.from_hf(make_fla("gla", attnres_block_size=2))
