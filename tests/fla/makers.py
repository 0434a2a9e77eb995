"""Tiny random models of fla, by model type."""

from __future__ import annotations

from typing import Any

import torch

from hookpoints.fla_support import import_fla

VOCAB = 64
_SHARED = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
# K != V everywhere; grouped value heads where the family has them.
_OWN: dict[str, dict[str, Any]] = {
    "gated_deltanet": {"head_dim": 8, "expand_v": 2.0, "num_heads": 2, "num_v_heads": 4},
    "delta_net": {"num_heads": 2, "expand_k": 0.5, "expand_v": 1.0},
    "gla": {"num_heads": 2, "expand_k": 0.5, "expand_v": 1.0},
    "hgrn2": {"expand_ratio": 8, "hidden_size": 48},
    "kda": {"head_dim": 8, "expand_v": 2.0, "num_heads": 2, "num_v_heads": 4},
    "retnet": {"num_heads": 2, "expand_k": 0.5, "expand_v": 1.0},
}
_CLASSES = {
    "gated_deltanet": "GatedDeltaNet",
    "delta_net": "DeltaNet",
    "gla": "GLA",
    "hgrn2": "HGRN2",
    "kda": "KDA",
    "retnet": "RetNet",
}


def make_fla(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny random model whose heads remember: decays near 1, as in trained checkpoints."""
    models = import_fla().models
    name = _CLASSES[model_type]
    config = getattr(models, f"{name}Config")(**{**_SHARED, **_OWN[model_type], **changes})
    torch.manual_seed(seed)
    model = getattr(models, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("dt_bias"):
                parameter.copy_(torch.linspace(-6.0, -2.0, parameter.numel()).view_as(parameter))
            elif parameter_name.endswith("A_log"):
                parameter.copy_(torch.linspace(0.0, 1.5, parameter.numel()).view_as(parameter))
            elif parameter.ndim == 2 and "norm" not in parameter_name:
                parameter.mul_(4.0)  # random weights of std 0.02 barely move the logits
    return model


MODEL_TYPES = tuple(sorted(_OWN))
