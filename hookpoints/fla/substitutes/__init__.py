"""What stands in for which of fla's functions on a CPU. To cover another kernel, write its torch form and add a line.

A substitute takes the same arguments as the function it stands in for and returns the same. Keys name the module that
defines the function; names that a version of fla lacks are passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hookpoints.fla.substitutes import pointwise, sequence

SUBSTITUTES: Mapping[str, Mapping[str, Callable[..., object]]] = {
    "fla.modules.norm.layernorm": {
        "layer_norm": pointwise.layer_norm,
        "group_norm": pointwise.group_norm,
        "rms_norm": pointwise.rms_norm,
        "layer_norm_linear": pointwise.layer_norm_linear,
    },
    "fla.modules.norm.fused_norm_gate": {
        "layer_norm_gated": pointwise.layer_norm_gated,
        "rms_norm_gated": pointwise.rms_norm_gated,
    },
    "fla.modules.norm.l2norm": {"l2norm": pointwise.l2norm},
    "fla.modules.activations.ops": {
        "sigmoid": pointwise.sigmoid,
        "logsigmoid": pointwise.logsigmoid,
        "swish": pointwise.swish,
        "elu_p1": pointwise.elu_p1,
        "sqrelu": pointwise.squared_relu,
        "fast_gelu_impl": pointwise.gelu,
        "bias_gelu_impl": pointwise.bias_gelu,
        "swiglu": pointwise.swiglu,
        "swiglu_linear": pointwise.swiglu_linear,
        "sigmoidglu": pointwise.sigmoidglu,
        "sigmoidglu_linear": pointwise.sigmoidglu_linear,
        "powglu": pointwise.powglu,
        "powglu_linear": pointwise.powglu_linear,
    },
    "fla.modules.causal_conv1d.ops": {
        "causal_conv1d": sequence.causal_conv1d,
        "causal_conv1d_update": sequence.causal_conv1d_update,
    },
    "fla.modules.rotary.ops": {"rotary_embedding": sequence.rotary_embedding},
    "fla.modules.token_shift": {"token_shift": sequence.token_shift},
    "fla.ops.rwkv7.fused_addcmul": {"fused_addcmul_rwkv7": pointwise.addcmul},
    "fla.ops.rwkv7.fused_k_update": {"fused_k_rwkv7": pointwise.key},
    "fla.ops.rwkv7.gate_output_correction": {"gate_output_correction": pointwise.gated_bonus},
    "fla.layers.attn": {
        "flash_attn_func": sequence.flash_attn_func,
        "flash_attn_varlen_func": sequence.flash_attn_varlen_func,
    },
}
"""Module -> function -> substitute."""
