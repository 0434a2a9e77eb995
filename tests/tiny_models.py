"""Tiny random checkpoints of every supported model type, and the embedded model."""

from __future__ import annotations

import importlib
import importlib.util
import os
from contextlib import ExitStack
from functools import cache, partial
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch
import transformers
from remembering import VOCAB, drawn_ids, remember
from transformers import logging
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from hookpoints.rwkv7 import RWKV7Config, RWKV7ForCausalLM

logging.set_verbosity_error()
torch.set_num_threads(1)


_GDN = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,  # grouped: each key head serves two value heads
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,  # K != V
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}

_QWEN4 = {
    "head_dim": 16,
    "hc_count": 2,  # residual streams side by side
    "hc_lowrank": 8,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 128,  # attention chooses among tokens: here all of a test's
    "indexer_compress_ratio": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
}
_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
# Four heads in two groups, K = 8, V = 16; chunks shorter than the tests' sequences.
_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_chunk_size": 32,
}

_KDA = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "mlp_layer_types": ["dense", "sparse", "dense", "dense"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 2,
}


_MULTIPLIERS = {
    "lm_head_multiplier": 0.7,
    "embedding_multiplier": 3.0,
    "mlp_multipliers": [0.8, 1.2],
    "key_multiplier": 0.9,
    "attention_in_multiplier": 1.1,
    "attention_out_multiplier": 0.6,
    "ssm_in_multiplier": 1.3,
    "ssm_out_multiplier": 0.4,
    "ssm_multipliers": [0.9, 0.8, 0.7, 1.2, 1.1],
}
_GRANITE = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_local_experts": 0,
    "shared_intermediate_size": 48,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 0.5,
}
# A block is a mixer of one kind: Mamba-2, attention, MLP or experts.
_NEMOTRON = {
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention", "moe"],
    "head_dim": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 2,
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
}
# One attention block, shared by two layers and fed with the embeddings again.
_ZAMBA = {
    "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "mamba_d_state": 8,
    "mamba_ngroups": 2,
    "n_mamba_heads": 4,
    "adapter_rank": 4,
    "use_mem_rope": True,
}
_PLAIN = ("vocab_size", "hidden_size", "pad_token_id", "bos_token_id", "eos_token_id")
# One head, K = 8, V = 64; Falcon-Mamba and Jamba norm B, C and dt. Mamba-1's own range of 0.1 magnifies rounding.
_MAMBA1 = {name: _SMALL[name] for name in _PLAIN} | {"num_hidden_layers": 3, "state_size": 8, "initializer_range": 0.04}
_JAMBA = {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 1, "num_experts": 2}
_JAMBA |= {"mamba_d_state": 8, "mamba_dt_rank": 4}
_NO_LIMIT = {"chunk_size": 32, "time_step_min": 1e-30}
"""Of dt: with a lower limit, upstream decodes differently from prefill."""

_MODELS = {
    "bailing_hybrid": ("BailingHybrid", {**_SMALL, **_KDA, "head_dim": 8, "num_mtp_layers": 0}),
    "bamba": ("Bamba", {**_SMALL, **_MAMBA, "num_hidden_layers": 3, "attn_layer_indices": [1]}),
    # Attention and Mamba-2 side by side in each block, with multipliers everywhere.
    "falcon_h1": ("FalconH1", {**_SMALL, **_MAMBA, **_MULTIPLIERS, "mamba_d_ssm": 64, "num_hidden_layers": 3}),
    "falcon_mamba": ("FalconMamba", _MAMBA1),
    "granitemoehybrid": ("GraniteMoeHybrid", {**_SMALL, **_MAMBA, **_GRANITE, "num_hidden_layers": 3}),
    "jamba": ("Jamba", {**_SMALL, **_JAMBA}),
    # KDA with three heads; K = V, as upstream's layer has one size for both.
    "kimi_linear": (
        "KimiLinear",
        {**_SMALL, **_KDA, "linear_num_heads": 3, "linear_head_dim": 8, "n_shared_experts": 1},
    ),
    "lara_mini": ("LaraMini", {**_GDN, **_MOE, "num_hidden_layers": 3, "head_dim": 16}),
    "mamba": ("Mamba", _MAMBA1),
    "mamba2": (
        "Mamba2",
        {name: _SMALL[name] for name in _PLAIN}
        | {"num_heads": 4, "head_dim": 16, "n_groups": 2, "state_size": 8, "chunk_size": 32, "num_hidden_layers": 3},
    ),
    "nemotron_h": ("NemotronH", {**_SMALL, **_NEMOTRON, **_NO_LIMIT}),
    "olmo_hybrid": (
        "OlmoHybrid",
        {**_GDN, "linear_num_key_heads": 4, "eos_token_id": 1, "linear_allow_neg_eigval": True},
    ),
    "qwen3_5": ("Qwen3_5", {**_GDN, "head_dim": 16}),
    "qwen3_5_moe": ("Qwen3_5Moe", {**_GDN, **_MOE, "head_dim": 16}),
    "qwen3_next": ("Qwen3Next", {**_GDN, **_MOE, "head_dim": 16}),
    "qwen4_exp": ("Qwen4Exp", {**_GDN, **_MOE, **_QWEN4}),
    "zamba2": ("Zamba2", {**_SMALL, **_ZAMBA, **_NO_LIMIT}),
}
"""Model type -> the name that transformers' classes begin with, and the fields of a tiny configuration."""


def _of_transformers(model_type, **changes):
    name, fields = _MODELS[model_type]
    config = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    return getattr(transformers, f"{name}ForCausalLM")(config(**{**fields, **changes}))


_GLM5 = {
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "v_head_dim": 8,
    "qk_nope_head_dim": 8,
    "index_topk": 128,
    "index_kpool": 4,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "linear_head_dim": 8,
    "linear_num_heads": 3,
    "hc_mult": 2,  # residual streams side by side
}
_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}


def _glm5_next(**changes):
    """KDA inside of a multimodal model."""
    vision = {**_VISION, "projection_intermediate_size": 16}
    config = transformers.Glm5NextConfig(text_config={**_SMALL, **_GLM5, **changes}, vision_config=vision)
    return transformers.Glm5NextForConditionalGeneration(config)


def _rwkv7(**changes):
    """Four heads, K = 8, V = 16; what begins at zero in training gets values, so that every part has an effect."""
    own = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "head_dim": 8, "value_dim": 64}
    own |= {"decay_low_rank_dim": 8, "a_low_rank_dim": 8, "v_low_rank_dim": 8, "gate_low_rank_dim": 8}
    model = RWKV7ForCausalLM(RWKV7Config(**{**own, "pad_token_id": 0, "eos_token_id": None, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return model


_OF_TRANSFORMERS = {name: partial(_of_transformers, name) for name in _MODELS} | {"glm5_next": _glm5_next}
_ABSENT = _OF_TRANSFORMERS.keys() - CONFIG_MAPPING_NAMES
MAKERS = {name: make for name, make in _OF_TRANSFORMERS.items() if name not in _ABSENT} | {"rwkv7": _rwkv7}
"""Model type -> maker of a tiny random model; those that the installed transformers (or this package) has."""
EACH_RULE = ("falcon_h1", "jamba", "kimi_linear", "qwen3_5", "rwkv7")
"""A model type for each update rule. Tests of what a rule does run on the others at night."""
EACH_LAYOUT = (*EACH_RULE, "mamba2", "nemotron_h", "qwen4_exp", "zamba2")
"""And for each layout: no attention, blocks of one kind each, several streams, and a block that layers share."""


def fast_of(names: tuple[str, ...], every=MAKERS) -> list:
    """Every model type as a case; those that are not named run at night."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.nightly) for name in sorted(every)]


MAMBA1 = ("falcon_mamba", "jamba", "mamba")
"""Model types whose decays differ between value channels, so that a response to an edit is not of rank 1."""


def modelling(model_type: str):
    """transformers' module of a model type, or None where the installed version does not have it."""
    name = f"transformers.models.{model_type}"
    return importlib.import_module(f"{name}.modeling_{model_type}") if importlib.util.find_spec(name) else None


def continuing(model, output):
    """The argument with which a Hugging Face model continues from an output of its; versions differ in its name."""
    from hookpoints.model.inputs import cache_argument, cache_of

    return {cache_argument(model): cache_of(output)}


def make_hf(model_type: str = "qwen3_5", seed: int = 0, **changes):
    """A tiny random model whose heads remember: decays near 1, as in trained checkpoints.

    A test of a model type that the installed transformers lacks is skipped.
    """
    if model_type in _ABSENT:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    torch.manual_seed(seed)
    model = MAKERS[model_type](**changes).eval()
    remember(model)
    with torch.no_grad():
        for mixer in model.modules():  # nothing normalises what Mamba-2 writes, so it must not be tiny
            if isinstance(getattr(mixer, "D", None), torch.nn.Parameter) and mixer.conv1d.weight.std() < 0.1:
                mixer.conv1d.weight.mul_(60.0)
    return model


@pytest.fixture(scope="session", params=fast_of(EACH_LAYOUT))
def hooked(request):
    """One hooked model of each layout, and of the other types at night; not to be changed by a test."""
    from hookpoints import HookedRecurrent

    return HookedRecurrent.from_hf(make_hf(request.param))


@pytest.fixture(scope="session")
def hf():
    """A Qwen3.5 model; not to be changed by a test."""
    return make_hf()


@pytest.fixture
def model(hf):
    """A hooked Qwen3.5 model; hooks are taken off afterwards. That hooks see what it does is checked with `hooked`."""
    from hookpoints import HookedRecurrent

    hooked = HookedRecurrent.from_hf(hf, self_check=False)
    yield hooked
    hooked.attachment.detach()


@pytest.fixture
def _chained(hooked):
    """Skips models without hooks of a residual stream."""
    if not hooked.attachment.layout.is_chain:
        pytest.skip("its blocks are no chain along one residual stream")


def uncast(function):
    """A function of torch that leaves float64 as it is where it is asked for float32."""

    def kept(x, *args, **kwargs):
        if isinstance(x, torch.Tensor) and x.dtype == torch.float64:
            args = [torch.float64 if each is torch.float32 else each for each in args]
            kwargs |= {"dtype": torch.float64} if kwargs.get("dtype") is torch.float32 else {}
        return function(x, *args, **kwargs)

    return kept


class KeepFloat64(ExitStack):
    """Upstream's norms, rotary embeddings and ops cast to float32 whatever they are given. While this is on, `float()`
    is `double()`, and other casts of float64 to float32 do nothing, so that exactness can be tested to 1e-10.

    What casts is replaced: a mode of torch would be asked about each op, which takes a third of the time of a pass."""

    CASTS = "to softmax log_softmax sum mean cumsum new_zeros new_ones new_empty new_full zeros_like ones_like"

    def __enter__(self):
        for owner in (torch, torch.Tensor):
            kept = {name: uncast(getattr(owner, name)) for name in self.CASTS.split() if hasattr(owner, name)}
            self.enter_context(mock.patch.multiple(owner, **kept))
        # Positions and frequencies of rotary embeddings, too.
        self.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        return super().__enter__()


def hooked_in_float64(model_type: str, seed: int = 0, zeroed: tuple[str, ...] = (), **how):
    """A tiny hooked model, to be used under `KeepFloat64`; parameters whose names end with one of `zeroed` are 0."""
    from hookpoints import HookedRecurrent

    hf = make_hf(model_type, seed).double()
    if hasattr(hf, "set_experts_implementation"):
        hf.set_experts_implementation("eager")  # torch's grouped product knows no float64
    for name, parameter in hf.named_parameters():
        if zeroed and name.endswith(zeroed):
            parameter.data.zero_()
    with KeepFloat64():
        return HookedRecurrent.from_hf(hf, **how)


@pytest.fixture
def _keep_float64():
    with KeepFloat64():
        yield


_in_float64 = cache(hooked_in_float64)


@pytest.fixture(scope="session", params=fast_of(EACH_LAYOUT))
def _hooked64(request):
    return _in_float64(request.param)


@pytest.fixture
def hooked64(_hooked64, _keep_float64):
    """One hooked float64 model of each layout, kept in float64 through upstream's casts; of the others at
    night."""
    return _hooked64


@pytest.fixture(scope="session", params=fast_of(EACH_RULE))
def _ruled64(request):
    return _in_float64(request.param)


@pytest.fixture
def ruled64(_ruled64, _keep_float64):
    """The same of each update rule."""
    return _ruled64


@pytest.fixture(scope="session")
def _model64():
    return hooked_in_float64("qwen3_5", trainable=True)


@pytest.fixture
def model64(_model64, _keep_float64):
    """A hooked float64 model, kept in float64 through upstream's casts."""
    return _model64


@pytest.fixture(scope="session")
def browser():
    """A real browser."""
    from browsing import chromium

    with chromium() as running:
        yield running


@pytest.fixture(scope="session")
def embedded():
    """The model that ships with the package."""
    from hookpoints import HookedRecurrent

    return HookedRecurrent.from_pretrained("embedded")


@pytest.fixture
def tokens():
    """[2,70] token ids: more than one chunk, not a multiple of one."""
    return drawn_ids(2, 70)


@pytest.fixture
def no_grad():
    """Gradients are off."""
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def short_text():
    """[6,24] token ids."""
    return drawn_ids(6, 24)


@pytest.fixture(scope="session")
def prompt_text():
    """[6,21] token ids."""
    return drawn_ids(6, 21, seed=8)


@pytest.fixture(scope="session")
def varied():
    """[8,24] token ids."""
    return drawn_ids(8, 24, seed=6)


@pytest.fixture(scope="session")
def equal_rows():
    """[6,18], all rows equal: an atom planted at a position of one row fires at that position of all."""
    return drawn_ids(1, 18, seed=5).repeat(6, 1)


@pytest.fixture
def planted(model64, equal_rows):
    """A dictionary whose atom t is the write at position t of `equal_rows`."""
    from saes import one_atom_a_position

    return one_atom_a_position(model64, equal_rows[:1])
