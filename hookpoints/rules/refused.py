"""What is not hooked, by name and with the reason: recurrences that are not of the canonical form, or have no rule."""

from __future__ import annotations

_ATTENTION = (
    "it attends to the keys and values of single tokens, which it keeps: there is no state that tokens write to"
)
_PRECONDITIONED = (
    "a second state, the running curvature of its keys, decides along which key it writes; Gated DeltaNet and KDA "
    "models are supported"
)
_SECOND_STATE = "divides its reads by a second, normalizing state"
_RARE = (
    "its update rule is in the plug-in hookpoints-rare, which is not installed: in the clone of the repository, "
    "pip install ./rare"
)

NOT_HOOKED: dict[str, str] = {
    "comba": _RARE,
    "hgrn": _RARE,
    "retnet": _RARE,
    "zamba": "its layers call Mamba-1's op once for each of their heads, and a hooked layer makes one call; Zamba2, "
    "Mamba, Falcon-Mamba and Jamba models are supported",
    "samba": "fla's layer of Mamba-1 has its recurrence written out inside a forward (slow_forward) where "
    "mamba_ssm's GPU kernels are missing; Mamba, Falcon-Mamba and Jamba models are supported",
    "minimax": "its lightning attention is written out inside MiniMaxLightningAttention.forward, in plain products of "
    "blocks: there is no op to intercept, and hooks would need a copy of that forward",
    "recurrent_gemma": "transformers keeps its states in the modules, not in a cache: after another text, in beams and "
    "for several tokens at once its own logits are wrong, so that nothing can be read on from; and its recurrence is a "
    "method (RecurrentGemmaRglru._rnn_scan), no op to intercept",
    "rwkv": "RWKV-4 keeps vectors and divides its reads by a second, normalizing state",
    "mamba3": "Mamba-3 adds two terms per token, the second with the token before (its trapezoidal rule), and only "
    "mamba_ssm's GPU kernels (mamba3_siso_combined, mamba3_step_fn) compute it, with no form in torch to compare with; "
    "Mamba and Mamba-2 models are supported",
    "abc": "ABC keeps two coupled states, not one",
    "gsa": "gated slot attention keeps two coupled states, not one",
    "raven": "its slots are gated slot attention's, which keeps two coupled states, not one",
    "cyclic_flow_attention": "CyFA keeps two coupled states, keys and values in slots that a clock turns, not one",
    "lightnet": "LightNet normalizes its keys over all tokens so far, which takes a second state",
    "log_linear_mamba2": "log-linear attention keeps a state for each level of a hierarchy, not one",
    "mom": "MoM routes each token to some of several memories, so its op sees other sequences than the model does",
    "titans": "Titans' memory is an MLP updated by gradient steps",
    "mesa_net": "MesaNet solves a linear system over its keys at each read",
    "xlstm": f"xLSTM {_SECOND_STATE}",
    "precond_gated_deltanet": _PRECONDITIONED,
    "precond_kda": _PRECONDITIONED,
    "linear_attn": "linear attention without a decay has no rule here; GLA models are supported",
    "rodimus": "Rodimus gives GLA's op one head as wide as the layer, between its own projections and residuals, "
    "which have no rule here; GLA models are supported",
    "yoco": "its upper half attends to keys and values that its lower half made, so its blocks are no chain along one "
    "residual stream",
    "bitnet": _ATTENTION,
    "cat": _ATTENTION,
    "deltaformer": _ATTENTION,
    "forgetting_transformer": _ATTENTION,
    "mla": _ATTENTION,
    "moba": _ATTENTION,
    "nsa": _ATTENTION,
    "parallax": _ATTENTION,
    "path_attn": _ATTENTION,
    "stickbreaking_attn": _ATTENTION,
    "transformer": _ATTENTION,
    "wall_transformer": _ATTENTION,
}
"""Model types that hookpoints alone does not hook, with the reason; a plug-in may have the rule of one."""

REFUSED_LAYERS: dict[str, str] = {
    **dict.fromkeys(("Comba", "GatedDeltaNet2", "HGRNAttention"), _RARE),
    **dict.fromkeys(("MultiScaleRetention", "SimpleGatedLinearAttention"), _RARE),
    "BasedLinearAttention": f"Based {_SECOND_STATE}",
    "ReBasedLinearAttention": f"ReBased {_SECOND_STATE}",
    "MomentumDeltaNet": "Momentum DeltaNet keeps two coupled states, the second a momentum of the first's writes",
}
"""Layers of fla by the name of their class, for models that someone made of them."""
