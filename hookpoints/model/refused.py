"""What of TransformerLens' HookedTransformer a recurrent model does not have, each with the reason: public names, and
arguments of ``from_pretrained``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches

from hookpoints.errors import InputError

_UNPROCESSED = "weights stay as the checkpoint has them; cache.apply_ln_to_stack applies the final norm's gain"
_REASONS: tuple[tuple[str, str], ...] = (
    (
        "W_Q W_K W_V b_Q b_K b_V QK OV all_composition_scores refactor_factored_attn_matrices fold_value_biases",
        "a convolution, norms and gates stand between the residual stream and q, k and v, so that no one matrix of a "
        "head leads there; the hooks q, k and v have the activations, layer_W_O the way out",
    ),
    ("W_in W_out W_gate b_in b_out", "MLPs differ between families and layers; find theirs in model.hf_model"),
    ("pos_embed W_pos W_E_pos get_pos_offset", "there is no table of positions: a recurrence needs none"),
    (
        "fold_layer_norm center_unembed center_writing_weights process_weights_ load_and_process_state_dict "
        "fill_missing_keys init_weights",
        _UNPROCESSED,
    ),
    (
        "set_use_attn_result set_use_split_qkv_input set_use_attn_in set_use_hook_mlp_in "
        "set_ungroup_grouped_query_attention",
        "no switch changes which hooks there are (hookpoints.HOOKS); heads' results come from "
        "cache.compute_head_results()",
    ),
    ("accumulated_bias", "cache.get_full_resid_decomposition has it as its part 'bias'; b_O is each layer's own"),
    ("input_to_embed get_residual", "model(tokens, stop_at_layer=0) is the stream that enters the first block"),
    ("generate_stream", "generate(tokens, streamer=...) takes transformers' streamers"),
    ("set_tokenizer", "model.tokenizer = tokenizer does it"),
    ("get_token_position to_single_str_token", "to_str_tokens lists the texts of tokens, to_string(token) gives one"),
    ("load_sample_training_dataset sample_datapoint", "no data set belongs to a model here"),
    ("move_model_modules_to_device mps", "model.to(device) moves it"),
)
REFUSED_NAMES = {name: reason for names, reason in _REASONS for name in names.split()}
"""Name -> why there is none, and what to use."""

_CHECKPOINT = "revision= names a commit or tag of the hub"
_ARGUMENTS: dict[str, tuple[object, str]] = {
    **dict.fromkeys(
        ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases", "refactor_factored_attn_matrices"),
        (False, _UNPROCESSED),
    ),
    "hf_model": (None, "HookedRecurrent.from_hf(model, tokenizer) takes a model at hand"),
    "tokenizer": (None, "model.tokenizer = tokenizer sets it"),
    "n_devices": (1, 'device_map="auto" spreads a model over devices'),
    "move_to_device": (True, "device= says where it goes"),
    **dict.fromkeys(("checkpoint_index", "checkpoint_value", "checkpoint_label"), (None, _CHECKPOINT)),
    **dict.fromkeys(
        ("load_in_4bit", "load_in_8bit"), (False, "quantization_config=BitsAndBytesConfig(...) of transformers has it")
    ),
    "first_n_layers": (None, "model(tokens, stop_at_layer=n) runs the first n"),
    "n_ctx": (None, "a recurrence has no longest context"),
    "default_prepend_bos": (None, "model.cfg.default_prepend_bos sets it"),
    "default_padding_side": (None, "model.tokenizer.padding_side sets it"),
}
"""Argument of HookedTransformer.from_pretrained, or of older transformers -> the value that asks for nothing, and what
to do instead."""
_FORWARD = {
    "past_kv_cache": "past_key_values= takes a cache of transformers, and memory= a memory",
    "shortformer_pos_embed": "a recurrence has no positions to embed",
}
"""Argument of HookedTransformer.forward -> what to do instead."""
_FREQUENCY = "repetition_penalty= or a logits_processor= of transformers makes tokens that were there less likely"


def refuse_arguments(arguments: Mapping[str, object]) -> dict[str, object]:
    """``arguments`` without TransformerLens' arguments that ask for nothing, as ``fold_ln=False`` does.

    Raises:
        InputError: one asks for something; says what to do instead.
    """
    for name in arguments.keys() & _ARGUMENTS.keys():
        nothing, instead = _ARGUMENTS[name]
        if arguments[name] is not None and arguments[name] != nothing:
            raise InputError(f"from_pretrained takes no {name}={arguments[name]!r}: {instead}")
    return {name: value for name, value in arguments.items() if name not in _ARGUMENTS}


def check_forward_arguments(arguments: Collection[str], known: Collection[str]) -> None:
    """Raise InputError for an argument of TransformerLens' ``forward`` that there is none of, or one that is nearly a
    ``known`` name. Models of transformers take any name, and nothing would come of it."""
    for name in arguments:
        if name in _FORWARD:
            raise InputError(f"the model takes no {name}: {_FORWARD[name]}")
        near = get_close_matches(name, known, n=1, cutoff=0.8)
        if near and name not in known:
            raise InputError(f"the model takes no {name}; nearest: {near[0]}")


def generation_arguments(arguments: Mapping[str, object]) -> dict[str, object]:
    """Arguments of TransformerLens' ``generate`` as transformers names them.

    Raises:
        InputError: a ``freq_penalty`` other than 0; says what to do instead.
    """
    renamed = dict(arguments)
    if "use_past_kv_cache" in renamed:
        renamed["use_cache"] = renamed.pop("use_past_kv_cache")
    if penalty := renamed.pop("freq_penalty", 0):
        raise InputError(f"generate takes no freq_penalty={penalty!r}: {_FREQUENCY}")
    return renamed
