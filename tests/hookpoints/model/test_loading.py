"""Which checkpoints load, and what the others are told."""

from __future__ import annotations

import json
import re
import types

import pytest
import torch
import transformers
from conftest import VOCAB, make_hf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hookpoints import HookedRecurrent, UnsupportedModelError
from hookpoints.model.config import RecurrentLayer
from hookpoints.model.layout import find_layout
from hookpoints.rules import REFUSED


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_refused_types_say_why(model_type):
    model = torch.nn.Module()
    model.config = types.SimpleNamespace(model_type=model_type)
    with pytest.raises(UnsupportedModelError, match=re.escape(REFUSED[model_type])):
        find_layout(model)


def test_mamba1_is_refused_before_its_weights_are_read(tmp_path):
    config = transformers.MambaConfig(vocab_size=VOCAB, hidden_size=16, state_size=4, num_hidden_layers=1)
    with pytest.raises(UnsupportedModelError, match="'mamba' cannot be hooked: Mamba-1 keeps one vector per channel"):
        HookedRecurrent.from_hf(transformers.MambaForCausalLM(config))
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="Mamba-1 keeps one vector per channel"):
        HookedRecurrent.from_pretrained(str(tmp_path))


@pytest.mark.filterwarnings("ignore:.*loaded without a tokenizer")
def test_a_mamba2_checkpoint_loads_even_where_fla_took_its_name(tmp_path, tokens, monkeypatch):
    """The format of AntonV/mamba2-370m-hf; importing fla registers other classes for the same model type."""

    class Other(transformers.PreTrainedConfig):
        model_type = "mamba2"

    hf = make_hf("mamba2")
    hf.save_pretrained(tmp_path)
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "mamba2", Other)
    assert type(transformers.AutoConfig.from_pretrained(tmp_path)) is Other
    model = HookedRecurrent.from_pretrained(str(tmp_path), device="cpu")
    with torch.no_grad():
        assert torch.equal(model(tokens), hf(tokens).logits)
    assert model.cfg.layer(0) == RecurrentLayer("Mamba-2", 4, 8, 16)


@pytest.mark.parametrize(
    ("name", "ssm_cfg", "match"),
    [
        ("mamba2-370m", {"layer": "Mamba2"}, r"AntonV/mamba2-370m-hf for state-spaces/mamba2-370m"),
        ("mamba-370m", {}, r"Mamba-1 model besides"),
    ],
)
def test_checkpoints_of_mamba_ssm_name_the_converted_one(tmp_path, name, ssm_cfg, match):
    """state-spaces/mamba2-370m has no model type; the same keys as its config.json."""
    config = {"d_model": 1024, "d_intermediate": 0, "n_layer": 48, "vocab_size": 50277, "ssm_cfg": ssm_cfg}
    config |= {"attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True}
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=match):
        HookedRecurrent.from_pretrained(str(tmp_path / name))
