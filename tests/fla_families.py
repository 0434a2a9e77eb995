"""Tiny random models of fla's families, for processes that know nothing of hookpoints as well."""

from __future__ import annotations

from typing import Any

import torch

VOCAB = 64
SHARED = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
# K != V everywhere but in RWKV-7, which fla cannot build so; grouped value heads where the family has them.
OWN: dict[str, dict[str, Any]] = {
    "gated_deltanet": {"head_dim": 8, "expand_v": 2.0, "num_heads": 2, "num_v_heads": 4},
    "delta_net": {"num_heads": 2, "expand_k": 0.5, "expand_v": 1.0},
    "gla": {"num_heads": 2, "expand_k": 0.5, "expand_v": 1.0},
    "hgrn2": {"expand_ratio": 8, "hidden_size": 48},
    "kda": {"head_dim": 8, "expand_v": 2.0, "num_heads": 2, "num_v_heads": 4},
    "retnet": {"num_heads": 2, "expand_k": 0.5, "expand_v": 1.0},
    "rwkv6": {"num_heads": 2, "expand_k": 0.5, "proj_low_rank_dim": 4, "gate_low_rank_dim": 6},
    "rwkv7": {
        "head_dim": 16,
        "decay_low_rank_dim": 4,
        "gate_low_rank_dim": 6,
        "a_low_rank_dim": 5,
        "v_low_rank_dim": 7,
    },
    "comba": {"head_dim": 8, "expand_v": 2.0, "num_heads": 2, "num_v_heads": 4},
    "gated_deltaproduct": {
        "head_dim": 8,
        "expand_v": 2.0,
        "num_heads": 2,
        "num_householder": 3,
        "use_forget_gate": True,
        "allow_neg_eigval": True,
    },
    "gated_deltanet2": {"head_dim": 8, "expand_v": 2.0, "num_heads": 2, "num_v_heads": 4, "allow_neg_eigval": True},
}
CLASSES = {
    "gated_deltanet": "GatedDeltaNet",
    "delta_net": "DeltaNet",
    "gla": "GLA",
    "hgrn2": "HGRN2",
    "kda": "KDA",
    "retnet": "RetNet",
    "rwkv6": "RWKV6",
    "rwkv7": "RWKV7",
    "comba": "Comba",
    "gated_deltaproduct": "GatedDeltaProduct",
    "gated_deltanet2": "KDA",
}


def make(models: Any, model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A model of ``models``, the module ``fla.models``, whose heads remember: decays near 1, as in trained
    checkpoints. Of Gated DeltaNet-2 fla has the layer and no model: here it is a KDA model with that layer."""
    name = CLASSES[model_type]
    config = getattr(models, f"{name}Config")(**{**SHARED, **OWN[model_type], **changes})
    torch.manual_seed(seed)
    model = getattr(models, f"{name}ForCausalLM")(config).eval()
    if model_type == "gated_deltanet2":
        from fla.layers.gdn2 import GatedDeltaNet2

        for index, block in enumerate(model.model.layers):
            block.attn = GatedDeltaNet2(config.hidden_size, **{**OWN[model_type], **changes, "layer_idx": index}).eval()
    remember(model)
    return model


@torch.no_grad()
def remember(model: torch.nn.Module) -> None:
    """Give a random model decays near 1, and weights that move its logits."""
    for name, parameter in model.named_parameters():
        if name.endswith(("dt_bias", "dt_proj.bias")):
            parameter.copy_(torch.linspace(-6.0, -2.0, parameter.numel()).view_as(parameter))
        elif name.endswith("A_log"):
            parameter.copy_(torch.linspace(0.0, 1.5, parameter.numel()).view_as(parameter))
        elif parameter.ndim == 2 and "norm" not in name:
            if not parameter.any():  # fla's RWKV-7's output projections
                parameter.normal_(std=0.05)
            parameter.mul_(4.0)  # random weights of std 0.02 barely move the logits
