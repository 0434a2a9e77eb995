"""Names that other tools have (TransformerLens, circuit-tracer, nnsight), and models, their parts and graphs lack here,
each with the reason and what to use."""

from __future__ import annotations

from typing import TYPE_CHECKING

UNPROCESSED = "weights stay as the checkpoint has them; cache.apply_ln_to_stack applies the final norm's gain"
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
        UNPROCESSED,
    ),
    (
        "set_use_attn_result set_use_split_qkv_input set_use_attn_in set_use_hook_mlp_in "
        "set_ungroup_grouped_query_attention enable_compatibility_mode",
        "no switch changes which hooks there are (hookpoints.HOOKS); heads' results come from "
        "cache.compute_head_results()",
    ),
    (
        "tl_named_parameters tl_parameters tl_state_dict",
        "model.hf_model.named_parameters() has all weights; W_E, W_U, b_U and layer_W_O have TransformerLens' names",
    ),
    ("accumulated_bias", "cache.get_full_resid_decomposition has it as its part 'bias'; b_O is each layer's own"),
    ("input_to_embed get_residual", "model(tokens, stop_at_layer=0) is the stream that enters the first block"),
    ("generate_stream", "generate(tokens, streamer=...) takes transformers' streamers"),
    ("set_tokenizer", "model.tokenizer = tokenizer does it"),
    ("get_token_position to_single_str_token", "to_str_tokens lists the texts of tokens, to_string(token) gives one"),
    ("load_sample_training_dataset sample_datapoint", "no data set belongs to a model here"),
    ("move_model_modules_to_device mps", "model.to(device) moves it"),
    (
        "saes add_sae reset_saes acts_to_saes run_with_saes run_with_cache_with_saes run_with_hooks_with_saes",
        "HookedSAERecurrent of the package sae-lens-writesae has it",
    ),
    (
        "trace session scan",
        "run_with_cache returns values, run_with_hooks and run_with_edits change them; nnsight wraps model.hf_model",
    ),
    ("attn", "a block without softmax attention has its hooks in mixer; model.hf_model has the module"),
    ("ln1 ln2 mlp ln1_post ln2_post", "blocks have hooks alone (hookpoints.HOOKS); model.hf_model has the modules"),
    ("w b", "the gain is in model.hf_model; cache.apply_ln_to_stack applies it"),
    ("W_E W_U b_U", "model.W_E, model.W_U and model.b_U have it"),
    ("to_pt from_pt", "graph.save(path) and Graph.load(path) keep it in a file"),
    ("adjacency_matrix prune prune_graph", "graph.nodes and graph.edges are tables; graph.draw() shows the largest"),
)
REFUSED_NAMES = {name: reason for names, reason in _REASONS for name in names.split()}
"""Name -> why a model, a part of it or a graph has none, and what to use."""


class Explaining:
    """What it lacks and other tools have raises an AttributeError that says what to use."""

    if not TYPE_CHECKING:  # which would let any name pass

        def __getattr__(self, name: str) -> object:
            try:
                return super().__getattr__(name)
            except AttributeError:
                instead = f": {REFUSED_NAMES[name]}" if name in REFUSED_NAMES else ""
                message = f"{type(self).__name__!r} object has no attribute {name!r}{instead}"
                raise AttributeError(message) from None
