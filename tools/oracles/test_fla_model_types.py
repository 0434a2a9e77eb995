"""Every model type and every layer of fla is hooked, or refused by name with the reason."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
from fla_models import MODEL_TYPES, import_fla, make_fla
from transformers import PreTrainedConfig

from hookpoints import HookedRecurrent, UnsupportedModelError, attach
from hookpoints.fla import MODEL_TYPES as OF_FLA
from hookpoints.model.layout import calls_of
from hookpoints.rules.known import REFUSED, RULES
from hookpoints.rules.refused import REFUSED_LAYERS

FLA = import_fla()
CONFIGS = {
    config.model_type: config
    for config in vars(FLA.models).values()
    if inspect.isclass(config) and issubclass(config, PreTrainedConfig)
}
"""Model type -> configuration, of all that fla registers."""
HOOKED = OF_FLA - REFUSED.keys()
OTHERS = sorted(set(CONFIGS) - HOOKED)
SMALL = {"num_hidden_layers": 2, "hidden_size": 512, "intermediate_size": 64, "vocab_size": 32}
OWN = {"rodimus": {"block_type": "rodimus"}}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*loaded without a tokenizer"),
    pytest.mark.filterwarnings("ignore:According to Bo"),  # fla's RWKV layers
]


def class_of(model_type: str):
    """The causal language model of a type."""
    return getattr(FLA.models, CONFIGS[model_type].__name__.removesuffix("Config") + "ForCausalLM")


def make(model_type: str):
    """A model of two layers without values."""
    with torch.device("meta"):
        return class_of(model_type)(CONFIGS[model_type](**SMALL, **OWN.get(model_type, {})))


def test_all_types_are_accounted_for():
    """fla's Mamba and Mamba-2 load as transformers' own."""
    assert len(CONFIGS) >= 40 and set(CONFIGS) >= HOOKED
    assert set(MODEL_TYPES) == HOOKED and not HOOKED & set(REFUSED)
    assert set(OTHERS) <= set(REFUSED) | {"mamba", "mamba2"}


@pytest.mark.parametrize("model_type", sorted(HOOKED))
@torch.no_grad()
def test_hooked_types_load_and_their_writes_fire(model_type, tmp_path, tokens):
    """Each layer's write is the product of its keys with what it stores, at every token."""
    make_fla(model_type).save_pretrained(tmp_path)
    model = HookedRecurrent.from_pretrained(str(tmp_path), device="cpu")
    assert model.cfg.model_type == model_type and model.cfg.recurrent_layers == [0, 1, 2]
    head = min(1, model.cfg.layer(0).H - 1)
    names = [f"blocks.{layer}.mixer.heads.{head}.hook_write" for layer in model.cfg.recurrent_layers]
    _, cache = model.run_with_cache(tokens, names_filter=names)
    for layer, name in zip(model.cfg.recurrent_layers, names, strict=True):
        shape = model.cfg.layer(layer)
        assert cache[name].shape == (*tokens.shape, shape.K, shape.V)
        ranks = torch.linalg.matrix_rank(cache[name].double(), rtol=1e-4)
        assert ranks.max() == shape.R and (ranks > 0).all()


@pytest.mark.parametrize("model_type", OTHERS)
def test_other_types_are_refused_in_hand(model_type, monkeypatch):
    # Layers of attention cannot be made where flash-attn is not installed.
    for name in ("attn", "mla"):
        monkeypatch.setattr(sys.modules[f"fla.layers.{name}"], "flash_attn_func", lambda: None)
    model = make(model_type)
    reason = REFUSED.get(model_type, f"load the checkpoint with transformers' {class_of(model_type).__name__}")
    for hook in (HookedRecurrent.from_hf, attach):
        with pytest.raises(UnsupportedModelError, match=f"'{model_type}' cannot be hooked: ") as error:
            hook(model)
        assert reason in str(error.value)


def test_all_layers_are_accounted_for():
    """A layer calls a rule's op, belongs to a refused model, or is refused itself."""
    ops = {rule.ops[0] for rule in RULES}
    others = {name for t in OTHERS for name in vars(sys.modules[class_of(t).__module__])}
    layers = {name: layer for name, layer in vars(FLA.layers).items() if inspect.isclass(layer)}
    unlisted = {"SimpleGatedLinearAttention"}  # in a module of fla.layers, and not in its index
    assert len(layers) > 30 and set(layers) | unlisted >= set(REFUSED_LAYERS)
    for name, layer in layers.items():
        known = bool(ops & calls_of(layer.__new__(layer)))
        assert known or name in others or name in REFUSED_LAYERS, name


def test_a_layer_of_another_make_is_refused_with_what_it_lacks():
    """Rodimus calls GLA's op, but its layers are not GLA's; here it comes under a name of its own."""
    model = make("rodimus")
    model.config.model_type = "mine"
    with pytest.raises(UnsupportedModelError, match="RodimusAttention"):
        HookedRecurrent.from_hf(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_layer_without_a_model_is_refused():
    model = make_fla("gla")
    for block in model.model.layers:
        block.attn = FLA.layers.MomentumDeltaNet(hidden_size=32, num_heads=2, head_dim=16)
    with pytest.raises(UnsupportedModelError, match="Momentum DeltaNet"):
        HookedRecurrent.from_hf(model)
