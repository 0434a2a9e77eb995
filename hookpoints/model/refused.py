"""Public names of TransformerLens' HookedTransformer that a recurrent model does not have, each with the reason."""

from __future__ import annotations

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
        "weights stay as the checkpoint has them; cache.apply_ln_to_stack applies the final norm's gain",
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
    ("load_sample_training_dataset sample_datapoint", "no data set belongs to a model here"),
    ("move_model_modules_to_device mps", "model.to(device) moves it"),
)
REFUSED = {name: reason for names, reason in _REASONS for name in names.split()}
"""Name -> why there is none, and what to use."""
