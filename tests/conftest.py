"""Tiny random checkpoints of every supported model type, and the embedded model."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers import logging

logging.set_verbosity_error()
torch.set_num_threads(1)

VOCAB = 64
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


def _qwen3_5(**changes):
    config = transformers.Qwen3_5TextConfig(**_GDN, head_dim=16, **changes)
    return transformers.Qwen3_5ForCausalLM(config)


def _qwen3_5_moe(**changes):
    config = transformers.Qwen3_5MoeTextConfig(**_GDN, **_MOE, head_dim=16, **changes)
    return transformers.Qwen3_5MoeForCausalLM(config)


def _qwen3_next(**changes):
    config = transformers.Qwen3NextConfig(**_GDN, **_MOE, head_dim=16, **changes)
    return transformers.Qwen3NextForCausalLM(config)


def _olmo_hybrid(**changes):
    own = {**_GDN, "linear_num_key_heads": 4, "eos_token_id": 1}
    config = transformers.OlmoHybridConfig(**own, linear_allow_neg_eigval=True, **changes)
    return transformers.OlmoHybridForCausalLM(config)


MAKERS = {
    "qwen3_5": _qwen3_5,
    "qwen3_5_moe": _qwen3_5_moe,
    "qwen3_next": _qwen3_next,
    "olmo_hybrid": _olmo_hybrid,
}
"""Model type -> maker of a tiny random model."""


def make_hf(model_type: str = "qwen3_5", seed: int = 0, **changes):
    """A tiny random model whose heads remember: decays near 1, as in trained checkpoints."""
    torch.manual_seed(seed)
    model = MAKERS[model_type](**changes).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("dt_bias"):
                parameter.copy_(torch.linspace(-6.0, -2.0, parameter.numel()))
            elif name.endswith("A_log"):
                parameter.copy_(torch.linspace(0.0, 1.5, parameter.numel()))
            elif parameter.ndim == 2 and "norm" not in name:
                parameter.mul_(4.0)  # random weights of std 0.02 barely move the logits
    return model


@pytest.fixture(scope="session", params=sorted(MAKERS))
def any_hf(request):
    """One model of each supported type; not to be changed by a test."""
    return make_hf(request.param)


@pytest.fixture(scope="session")
def hf():
    """A Qwen3.5 model; not to be changed by a test."""
    return make_hf()


@pytest.fixture
def model(hf):
    """A hooked Qwen3.5 model; hooks are taken off afterwards."""
    from hookpoints import HookedRecurrent

    hooked = HookedRecurrent.from_hf(hf)
    yield hooked
    hooked.attachment.detach()


class KeepFloat64(TorchFunctionMode):
    """Upstream's norms, rotary embeddings and ops cast to float32 whatever they are given. While this is on, casts of
    float64 tensors to float32 do nothing, so that exactness can be tested to 1e-10."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.float and not args[0].is_floating_point():  # positions of rotary embeddings
            return args[0].double()
        double = bool(args) and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64
        if double and func is torch.Tensor.float:
            return args[0]
        if double and func is torch.Tensor.to and (torch.float32 in args or kwargs.get("dtype") == torch.float32):
            return args[0]
        if double and kwargs.get("dtype") == torch.float32:  # softmax(x, dtype=torch.float32) and the like
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


@pytest.fixture(scope="session")
def _model64():
    from hookpoints import HookedRecurrent

    with KeepFloat64():
        return HookedRecurrent.from_hf(make_hf().double())


@pytest.fixture
def model64(_model64):
    """A hooked float64 model, kept in float64 through upstream's casts."""
    with KeepFloat64():
        yield _model64


@pytest.fixture(scope="session")
def embedded():
    """The model that ships with the package."""
    from hookpoints import HookedRecurrent

    return HookedRecurrent.from_pretrained("embedded")


@pytest.fixture
def tokens():
    """[2,70] token ids: more than one chunk, not a multiple of one."""
    return torch.randint(1, VOCAB, (2, 70), generator=torch.Generator().manual_seed(1))
