"""RWKV-7 checkpoints of flash-linear-attention's format: names, configuration, dtypes, both versions."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_hf

from hookpoints import HookedRecurrent
from hookpoints.model.config import RecurrentLayer
from hookpoints.rwkv7 import RWKV7Config, RWKV7ForCausalLM

PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text())
"""A config.json with the keys that fla writes, and the sizes of a world model of 1.5B."""


@pytest.fixture
def checkpoint(tmp_path):
    """A small checkpoint as fla saves it, with K = V; returns its folder and the model that it holds."""
    hf = make_hf("rwkv7", value_dim=32)
    hf.save_pretrained(tmp_path)
    return tmp_path, hf


def loaded(path, **options) -> HookedRecurrent:
    with pytest.warns(UserWarning, match="without a tokenizer"):
        return HookedRecurrent.from_pretrained(str(path), device="cpu", **options)


def test_the_published_configuration_and_names(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    config = RWKV7Config.from_pretrained(tmp_path)
    assert (config.num_heads, config.head_dim, config.value_dim) == (32, 64, [2048] * 24)
    config.num_hidden_layers = 2
    with torch.device("meta"):
        shapes = {name: list(p.shape) for name, p in RWKV7ForCausalLM(config).named_parameters()}
    assert shapes == json.loads(Path(__file__).with_name("published_shapes.json").read_text())


@torch.no_grad()
def test_a_checkpoint_loads_without_fla(checkpoint, tokens):
    path, hf = checkpoint
    before = set(sys.modules)
    model = loaded(path)
    assert type(model.hf_model) is RWKV7ForCausalLM and model.cfg.layer(2) == RecurrentLayer("RWKV-7", 4, 8, 8)
    assert torch.equal(model(tokens), hf(tokens).logits)  # no weight was initialised anew
    assert not {name for name in set(sys.modules) - before if name.split(".")[0] == "fla"}


@torch.no_grad()
@pytest.mark.parametrize("sharded", [False, True])
def test_the_first_version_of_the_format(checkpoint, tokens, sharded):
    """RWKV/RWKV7-Goose-World3-1.5B-HF and others hold the six token shifts of a layer in one tensor."""
    path, hf = checkpoint
    weights = load_file(path / "model.safetensors")
    for layer in range(3):
        stem = f"model.layers.{layer}.attn."
        weights[f"{stem}x_x"] = torch.stack([weights.pop(f"{stem}x_{name}").view(-1) for name in "rwkvag"])
    (path / "model.safetensors").unlink()
    of_file = {name: f"model-{i % 3}.safetensors" if sharded else "model.safetensors" for i, name in enumerate(weights)}
    for file in set(of_file.values()):
        part = {name: value for name, value in weights.items() if of_file[name] == file}
        save_file(part, path / file, metadata={"format": "pt"})
    if sharded:
        index = {"metadata": {}, "weight_map": of_file}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(loaded(path)(tokens), hf(tokens).logits)


def test_tied_embeddings(tmp_path, tokens):
    hf = make_hf("rwkv7", tie_word_embeddings=True)
    hf.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = loaded(tmp_path)
    assert model.hf_model.lm_head.weight is model.hf_model.model.embeddings.weight
    with torch.no_grad():
        assert torch.equal(model(tokens), hf(tokens).logits)


def test_configurations_that_make_no_sense():
    for match, changes in {
        r"softmax attention \(config.attn\)": {"attn": {"layers": [1], "num_heads": 2}},
        "relu squared .* not 'silu'": {"hidden_act": "silu"},
        "head_dim 48": {"head_dim": 48},
        "num_heads 16": {"num_heads": 16},
        "4096": {"value_dim": [2048, 4096]},
    }.items():
        with pytest.raises(ValueError, match=match):
            RWKV7Config(**{**PUBLISHED, **changes})


def test_inputs_that_make_no_sense(tokens):
    hf = make_hf("rwkv7")
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        hf(None)
    with pytest.raises(ValueError, match=r"attention_mask must be \[B,T\] for an input of \[2, 70\], got \[1, 70\]"):
        hf(tokens, attention_mask=torch.ones(1, 70))


def test_a_norm_has_a_bias_if_the_config_says_so():
    assert "model.norm.bias" not in make_hf("rwkv7", norm_bias=False).state_dict()
