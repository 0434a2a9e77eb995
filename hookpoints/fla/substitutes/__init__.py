"""What stands in for which of fla's functions on a CPU. To cover another kernel, write its torch form and add a line.

A substitute takes the same arguments as the function it stands in for and returns the same. Keys name the module that
defines the function; names that a version of fla lacks are passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hookpoints.fla.substitutes import activations, attention, convolution, norms, positions, rwkv

SUBSTITUTES: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    "fla.modules.norm.layernorm": {
        "layer_norm": norms.layer_norm,
        "group_norm": norms.group_norm,
        "rms_norm": norms.rms_norm,
        "layer_norm_linear": norms.layer_norm_linear,
    },
    "fla.modules.norm.fused_norm_gate": {
        "layer_norm_gated": norms.layer_norm_gated,
        "rms_norm_gated": norms.rms_norm_gated,
    },
    "fla.modules.norm.l2norm": {"l2norm": norms.l2norm},
    "fla.modules.activations.ops": {
        "sigmoid": activations.sigmoid,
        "logsigmoid": activations.logsigmoid,
        "swish": activations.swish,
        "elu_p1": activations.elu_p1,
        "sqrelu": activations.squared_relu,
        "fast_gelu_impl": activations.gelu,
        "bias_gelu_impl": activations.bias_gelu,
        "swiglu": activations.swiglu,
        "swiglu_linear": activations.swiglu_linear,
        "sigmoidglu": activations.sigmoidglu,
        "sigmoidglu_linear": activations.sigmoidglu_linear,
        "powglu": activations.powglu,
        "powglu_linear": activations.powglu_linear,
    },
    "fla.modules.causal_conv1d.ops": {
        "causal_conv1d": convolution.causal_conv1d,
        "causal_conv1d_update": convolution.causal_conv1d_update,
    },
    "fla.modules.rotary.ops": {"rotary_embedding": positions.rotary_embedding},
    "fla.modules.token_shift": {"token_shift": positions.token_shift},
    "fla.ops.rwkv7.fused_addcmul": {"fused_addcmul_rwkv7": rwkv.addcmul},
    "fla.ops.rwkv7.fused_k_update": {"fused_k_rwkv7": rwkv.key},
    "fla.ops.rwkv7.gate_output_correction": {"gate_output_correction": rwkv.gated_bonus},
    "fla.layers.attn": {
        "flash_attn_func": attention.flash_attn_func,
        "flash_attn_varlen_func": attention.flash_attn_varlen_func,
    },
}
"""Module -> function -> substitute."""
