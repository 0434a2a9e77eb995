"""Which checkpoints load, and what the others are told."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import make_hf
from torch.testing import assert_close
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hookpoints import HookedRecurrent, UnknownModelError, UnsupportedModelError
from hookpoints.errors import InputError
from hookpoints.model import loading
from hookpoints.model.config import RecurrentLayer


@pytest.mark.filterwarnings("ignore:.*loaded without a tokenizer")
@pytest.mark.parametrize(("name", "shape"), [("mamba", ("Mamba-1", 1, 8, 64)), ("mamba2", ("Mamba-2", 4, 8, 16))])
def test_a_mamba_checkpoint_loads_even_where_fla_took_its_name(name, shape, tmp_path, tokens, monkeypatch):
    """The format of AntonV/mamba2-370m-hf; importing fla registers other classes for the same model type."""

    class Other(transformers.PreTrainedConfig):
        model_type = name

    hf = make_hf(name)
    hf.save_pretrained(tmp_path)
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, name, Other)
    assert type(transformers.AutoConfig.from_pretrained(tmp_path)) is Other
    model = HookedRecurrent.from_pretrained(str(tmp_path), device="cpu")
    with torch.no_grad():
        assert torch.equal(model(tokens), hf(tokens).logits)
    assert model.cfg.layer(0) == RecurrentLayer(*shape)


@pytest.mark.parametrize(
    ("name", "ssm_cfg", "match"),
    [
        ("mamba2-370m", {"layer": "Mamba2"}, r"AntonV/mamba2-370m-hf for state-spaces/mamba2-370m"),
        ("mamba-370m", {}, r"state-spaces/mamba-370m-hf for state-spaces/mamba-370m"),
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


ADDED = "model.layers.1.post_attention_layernorm.weight"


@pytest.fixture
def checkpoint(tmp_path):
    """A whole checkpoint in a folder of its own."""
    make_hf().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*loaded without a tokenizer")
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({ADDED: None}, ADDED),  # it is gone
        ({"foreign.weight": torch.ones(2)}, "foreign"),
        ({ADDED: torch.ones(3)}, "layernorm"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused_by_name(checkpoint, change, named):
    """transformers would go on with random numbers; a hooked model must not."""
    loading.load(str(checkpoint))
    file = checkpoint / "model.safetensors"
    tensors = {name: x for name, x in (load_file(file) | change).items() if x is not None}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=named):
        loading.load(str(checkpoint))


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_too_little_memory_is_no_damage(error):
    with pytest.raises(error), loading._errors_name_the_model("large"):
        raise error


def test_a_model_type_that_transformers_lacks_is_named_with_the_installed_version(checkpoint):
    """Not a damaged file: a later release may have it."""
    (checkpoint / "config.json").write_text('{"model_type": "qwen9_next"}')
    expected = f"expected a model type that transformers {re.escape(transformers.__version__)} has, got 'qwen9_next'"
    with pytest.raises(UnsupportedModelError, match=f"{expected}; upgrade transformers"):
        loading.load(str(checkpoint))


@pytest.mark.parametrize("name", ["embeded", "gpt2", "./nothing", "a/b/c", "a[/x]"])
def test_what_cannot_be_a_name_on_the_hub_is_refused_without_asking_there(name, monkeypatch):
    monkeypatch.setattr(loading.PreTrainedConfig, "get_config_dict", None)  # what asks
    with pytest.raises(UnknownModelError, match="embedded") as raised:
        HookedRecurrent.from_pretrained(name)
    assert isinstance(raised.value, OSError) and repr(name) in str(raised.value)


def test_without_weights_a_model_has_its_shapes_and_hooks(tmp_path):
    hf = make_hf("rwkv7")
    hf.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    shapes, model = HookedRecurrent.from_pretrained(str(tmp_path), device="meta"), HookedRecurrent.from_hf(hf)
    assert shapes.cfg.layers == model.cfg.layers and shapes.hook_dict.keys() == model.hook_dict.keys()
    assert all(parameter.is_meta for parameter in shapes.parameters())
    with pytest.raises(InputError, match="expected one with weights"):
        shapes("text")
    with pytest.raises(InputError, match=r"device: expected one of this machine .* got 'xpu:99'"):
        HookedRecurrent.from_pretrained(str(tmp_path), device="xpu:99")


def test_multimodal_checkpoint_gives_its_text_model(tmp_path, tokens):
    """Published Qwen3.5 checkpoints name the multimodal class."""
    text = make_hf().config.to_dict()
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    whole = transformers.Qwen3_5ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path)
    model = HookedRecurrent.from_pretrained(str(tmp_path), device_map={"": "cpu"})
    assert type(model.hf_model).__name__ == "Qwen3_5ForCausalLM"
    with torch.no_grad():
        assert_close(model(tokens), whole(tokens).logits, rtol=0, atol=5e-6)
        hooked = HookedRecurrent.from_hf(whole)  # along the path to its language model
        assert hooked.cfg.layers == model.cfg.layers and hooked.hook_dict.keys() == model.hook_dict.keys()
        assert torch.equal(hooked(tokens), model(tokens))
        assert torch.equal(hooked(hooked(tokens, stop_at_layer=2), start_at_layer=2), model(tokens))


def test_a_broken_tokenizer_is_not_mistaken_for_none(tmp_path, hf):
    hf.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "tokenizer.json").write_text("{ truncated")
    with pytest.warns(UserWarning, match="loaded without a tokenizer"):
        model = HookedRecurrent.from_pretrained(str(tmp_path), device="cpu")
    with pytest.raises(ValueError, match="has no tokenizer"):
        model.to_tokens("text")
