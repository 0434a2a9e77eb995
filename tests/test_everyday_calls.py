"""Everyday calls of TransformerLens and SAELens, as their documents have them, on a recurrent model: each works, or
raises an error that says what to do. `PYTHONPATH=tests python -m test_everyday_calls` writes the table of
docs/compatibility.md.
"""

from __future__ import annotations

import copy
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, TrainingSAE
from saes import make_sae
from transformer_lens import patching, utils

from hookpoints import HookedRecurrent
from sae_lens_writesae import HookedSAERecurrent, text_dataset, training_config

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
WORKS = ""
TRANSFORMER_LENS: dict[str, dict[str, str]] = {
    "Load": {
        "HookedRecurrent.from_pretrained(NAME)": WORKS,
        "HookedRecurrent.from_pretrained(NAME, device='cpu')": WORKS,
        "HookedRecurrent.from_pretrained(NAME, dtype=torch.bfloat16)": WORKS,
        "HookedRecurrent.from_pretrained(NAME, dtype='bfloat16')": WORKS,
        "HookedRecurrent.from_pretrained(NAME, torch_dtype=torch.bfloat16)": WORKS,
        "HookedRecurrent.from_pretrained(NAME, dtype='bf16')": "'bfloat16'",
        "HookedRecurrent.from_pretrained(NAME, dtype=torch.int8)": "'bfloat16'",
        "HookedRecurrent.from_pretrained(NAME, dtype='float32', torch_dtype=torch.bfloat16)": "dtype and torch_dtype",
        "HookedRecurrent.from_pretrained(Path(NAME))": WORKS,
        "HookedRecurrent.from_pretrained_no_processing(NAME)": WORKS,
        "HookedRecurrent.boot_transformers(NAME)": WORKS,
        "HookedRecurrent.from_pretrained(NAME, fold_ln=False, center_unembed=False)": WORKS,
        "HookedRecurrent.from_pretrained(NAME, fold_ln=True)": "fold_ln",
        "HookedRecurrent.from_pretrained(NAME, center_writing_weights=True)": "center_writing_weights",
        "HookedRecurrent.from_pretrained(NAME, n_devices=2)": "n_devices",
        "HookedRecurrent.from_pretrained('embeded')": "nearest: embedded",
        "model.eval()": WORKS,
        "model.to('cpu')": WORKS,
        "model.cpu()": WORKS,
        "copy.deepcopy(model)": "hook the copy",
    },
    "Configuration": {
        "model.cfg.n_layers": WORKS,
        "model.cfg.d_model": WORKS,
        "model.cfg.n_heads": WORKS,
        "model.cfg.d_head": WORKS,
        "model.cfg.d_vocab": WORKS,
        "model.cfg.n_ctx": WORKS,
        "model.cfg.act_fn": WORKS,
        "model.cfg.device": WORKS,
        "model.cfg.model_name": WORKS,
        "model.cfg.normalization_type": WORKS,
        "model.cfg.to_dict()": WORKS,
        "model.tokenizer": WORKS,
    },
    "Weights": {
        "model.W_E": WORKS,
        "model.W_U": WORKS,
        "model.b_U": WORKS,
        "model.W_O": "layer_W_O",
        "model.layer_W_O(1)": WORKS,
        "model.W_Q": "W_Q",
        "model.W_in": "W_in",
        "model.W_pos": "W_pos",
        "model.OV": "OV",
        "model.QK": "QK",
        "dict(model.named_parameters())": WORKS,
        "model.state_dict()": WORKS,
        "model.all_head_labels()": WORKS,
        "model.embed(tokens)": WORKS,
        "model.unembed(model.ln_final(cache['resid_post', -1]))": WORKS,
        "model.tokens_to_residual_directions(' the')": WORKS,
        "model.set_use_attn_result(True)": "set_use_attn_result",
        "model.set_use_split_qkv_input(True)": "set_use_split_qkv_input",
        "model.fold_layer_norm()": "fold_layer_norm",
    },
    "Tokens": {
        "model.to_tokens(text)": WORKS,
        "model.to_tokens([text, 'The war'])": WORKS,
        "model.to_tokens(text, prepend_bos=False)": WORKS,
        "model.to_tokens([text, 'The war'], padding_side='left')": WORKS,
        "model.to_str_tokens(text)": WORKS,
        "model.to_str_tokens(tokens[0])": WORKS,
        "model.to_str_tokens([text, 'The war'])": WORKS,
        "model.to_string(tokens)": WORKS,
        "model.to_string(tokens[0])": WORKS,
        "model.to_single_token(' the')": WORKS,
        "model.to_single_token(' the war')": "2 tokens",
        "model.to_single_str_token(5)": "to_string(token)",
        "model.get_token_position(' people', text)": "to_str_tokens",
    },
    "Run": {
        "model(text)": WORKS,
        "model(tokens)": WORKS,
        "model([text, 'The war'])": WORKS,
        "model(tokens, return_type='loss')": WORKS,
        "model(tokens, return_type='both')": WORKS,
        "model(tokens, return_type=None)": WORKS,
        "model(tokens, return_type='loss', loss_per_token=True)": WORKS,
        "model(tokens, stop_at_layer=2)": WORKS,
        "model(cache['resid_pre', 2], start_at_layer=2)": WORKS,
        "model(tokens, prepend_bos=True)": WORKS,
        "model(tokens, past_kv_cache=object())": "past_key_values",
        "model(tokens, return_typ='loss')": "nearest: return_type",
        "model(tokens, fwd_hooks=[('hook_embed', double)])": "run_with_hooks takes it",
        "model.loss_fn(logits, tokens)": WORKS,
        "utils.lm_cross_entropy_loss(logits, tokens)": WORKS,
        "utils.test_prompt('The people of the United', ' States', model, print_details=False)": WORKS,
    },
    "Generate": {
        "model.generate(text, max_new_tokens=2)": WORKS,
        "model.generate(tokens, max_new_tokens=2, do_sample=False, verbose=False)": WORKS,
        "model.generate(text, max_new_tokens=2, temperature=0.7, top_k=5)": WORKS,
        "model.generate(text, max_new_tokens=2, stop_at_eos=False)": WORKS,
        "model.generate(text, max_new_tokens=2, use_past_kv_cache=False)": WORKS,
        "model.generate(text, max_new_tokens=2, return_type='tokens')": WORKS,
        "model.generate(text, max_new_tokens=2, freq_penalty=1.0)": "repetition_penalty",
        "model.generate_stream(text)": "generate_stream",
    },
    "Cache": {
        "model.run_with_cache(tokens)": WORKS,
        "model.run_with_cache(text, return_type='loss')": WORKS,
        "model.run_with_cache(tokens, remove_batch_dim=True)": WORKS,
        "model.run_with_cache(tokens, stop_at_layer=2)": WORKS,
        "model.run_with_cache(tokens, names_filter='blocks.1.hook_resid_pre')": WORKS,
        "model.run_with_cache(tokens, names_filter=['hook_embed', 'blocks.1.mlp.hook_post'])": "nearest",
        "model.run_with_cache(tokens, names_filter=lambda name: name.endswith('resid_post'))": WORKS,
        "model.run_with_cache(tokens, names_filter=lambda name: False)": "matches none",
        "model.run_with_cache(tokens, names_filter=[])": WORKS,
        "model.run_with_cache(tokens, name_filter='hook_embed')": "nearest: names_filter",
        "model.run_with_cache(tokens, names_filter=utils.get_act_name('resid_pre', 1))": WORKS,
        "model.run_with_cache(tokens, return_cache_object=False)": WORKS,
        "model.run_with_cache(tokens, device='cpu')": WORKS,
        "model.run_with_cache(tokens, incl_bwd=True, return_type='loss')": WORKS,
        "cache['resid_pre', 1]": WORKS,
        "cache['resid_post', -1]": WORKS,
        "cache['embed']": WORKS,
        "cache['q', 0]": WORKS,
        "cache['z', 1]": WORKS,
        "cache['mlp_out', 1]": WORKS,
        "cache['attn_out', 0]": WORKS,
        "cache['pattern', 0]": "name it in names_filter",
        "model.run_with_cache(tokens, names_filter='blocks.0.attn.hook_pattern')[1]['pattern', 0]": WORKS,
        "cache['blocks.1.hook_resid_post']": WORKS,
        "cache['scale', 1, 'ln1']": WORKS,
        "list(cache.keys())": WORKS,
        "dict(cache.items())": WORKS,
        "cache.to('cpu')": WORKS,
        "cache.accumulated_resid(apply_ln=True, return_labels=True)": WORKS,
        "cache.decompose_resid(return_labels=True)": WORKS,
        "cache.stack_head_results(return_labels=True)": WORKS,
        "cache.get_full_resid_decomposition(return_labels=True)": WORKS,
        "cache.logit_attrs(cache.decompose_resid(), ' the')": WORKS,
        "cache.apply_ln_to_stack(cache.decompose_resid())": WORKS,
        "cache.stack_activation('resid_pre')": WORKS,
        "cache.stack_neuron_results(-1)": "is no hook of this model",
    },
    "Hooks": {
        "model.run_with_hooks(tokens, fwd_hooks=[('blocks.1.hook_resid_pre', double)])": WORKS,
        "model.run_with_hooks(tokens, fwd_hooks=[(utils.get_act_name('resid_pre', 1), double)])": WORKS,
        "model.run_with_hooks(tokens, fwd_hooks=[(lambda name: name.endswith('hook_z'), double)])": WORKS,
        "model.run_with_hooks(tokens, return_type='loss', fwd_hooks=[('hook_embed', partial(double))])": WORKS,
        "model.run_with_hooks(tokens, fwd_hooks=(('hook_embed', double),))": WORKS,
        "model.run_with_hooks(tokens, fwd_hooks={'hook_embed': double})": "expected a list of pairs (name, hook)",
        "model.run_with_hooks(tokens, fwd_hooks=('hook_embed', double))": "expected a list of pairs (name, hook)",
        "model.run_with_hooks(tokens, fwd_hooks=[('hook_embed', None)])": "expected a list of pairs (name, hook)",
        "model.run_with_hooks(tokens, fwd_hook=[('hook_embed', double)])": "nearest: fwd_hooks",
        "model.run_with_hooks(tokens, fwd_hooks=[('blocks.1.hook_resid_pree', double)])": "nearest",
        "model.run_with_hooks(tokens, fwd_hooks=[('blocks.9.hook_resid_pre', double)])": "nearest",
        "model.add_hook('blocks.1.hook_resid_pre', double)": WORKS,
        "model.reset_hooks()": WORKS,
        "model.hooks(fwd_hooks=[('blocks.1.hook_resid_pre', double)])": WORKS,
        "model.hook_dict": WORKS,
        "model.mod_dict": WORKS,
        "model.hook_points()": WORKS,
        "model.get_caching_hooks(lambda name: True)": WORKS,
        "model.remove_all_hook_fns()": WORKS,
        "patching.get_act_patch_resid_pre(model, tokens, cache, metric)": WORKS,
        "patching.get_act_patch_mlp_out(model, tokens, cache, metric)": WORKS,
        "patching.get_act_patch_attn_out(model, tokens, cache, metric)": WORKS,
    },
    "Their notebooks": {
        "model.enable_compatibility_mode(disable_warnings=True)": "no switch changes which hooks there are",
        "model.set_use_hook_mlp_in(True)": "no switch changes which hooks there are",
        "model.tl_named_parameters()": "model.hf_model.named_parameters()",
        "model.get_token_position(' people', text, prepend_bos=False)": "to_str_tokens",
        "model.loss_fn(logits, tokens, per_token=True)": WORKS,
        "model.blocks[2].mixer.hook_z.add_hook(double)": WORKS,
        "model.run_with_hooks(tokens, fwd_hooks=[(utils.get_act_name('v', 2), double)])": WORKS,
        "model.run_with_hooks(tokens, fwd_hooks=[(utils.get_act_name('pattern', 2), double)])": WORKS,
        "model.run_with_hooks(tokens, fwd_hooks=[(utils.get_act_name('attn', 2, 'attn'), double)])": WORKS,
        "model.run_with_hooks(tokens, fwd_hooks=[(utils.get_act_name('in', 2), double)])": "blocks.2.hook_resid_pre",
        "model.run_with_hooks(tokens, fwd_hooks=[(lambda name: name.endswith('pattern'), double)])": WORKS,
        "cache['pattern', 2, 'attn']": "name it in names_filter",
        "model.run_with_cache(tokens)[1]['result', 2, 'attn']": "cache.compute_head_results()",
        "cache['scale', 2, 'ln1']": WORKS,
        "cache.accumulated_resid(layer=-1, incl_mid=True, pos_slice=-1, return_labels=True)": WORKS,
        "cache.stack_head_results(layer=-1, pos_slice=-1, return_labels=True)": WORKS,
        "cache.apply_ln_to_stack(cache.decompose_resid(pos_slice=-1), layer=-1, pos_slice=-1)": WORKS,
        "cache.get_full_resid_decomposition(layer=-1, pos_slice=-1, apply_ln=True)": WORKS,
        "cache.get_full_resid_decomposition(layer=-1, expand_neurons=True)": "no hook holds the neurons",
        "patching.get_act_patch_block_every(model, tokens, cache, metric)": WORKS,
        "patching.get_act_patch_attn_head_out_all_pos(model, tokens, cache, metric)": WORKS,
        "patching.get_act_patch_attn_head_by_pos_every(model, tokens, cache, metric)": "index_df",
        "model.add_hook(lambda name: 'resid' in name, double, 'bwd')": WORKS,
    },
}
"""Part -> call -> what its error says; nothing: it works."""
SAE_LENS: dict[str, dict[str, str]] = {
    "Dictionaries": {
        "SAE.load_from_disk(folder)": WORKS,
        "SAE.load_from_disk(folder, device='cpu')": WORKS,
        "TrainingSAE.load_from_disk(folder)": "rescale_acts_by_decoder_norm",
        "SAE.from_dict(sae.cfg.to_dict())": WORKS,
        "sae.cfg.to_dict()": WORKS,
        "sae.cfg.d_in": WORKS,
        "sae.cfg.metadata.hook_name": WORKS,
        "sae.encode(writes)": WORKS,
        "sae.encode(matrices)": ".flatten(-2)",
        "sae.encode(matrices.flatten(-2))": WORKS,
        "sae.decode(sae.encode(writes))": WORKS,
        "sae(writes)": WORKS,
        "sae.W_enc": WORKS,
        "sae.W_dec": WORKS,
        "sae.W_dec.__setitem__(0, 0.0)": "replace_atoms",
        "sae.W_dec.mul_(2)": "replace_atoms",
        "sae.W_enc.__setitem__(0, 0.0)": "replace_atoms",
        "sae.b_dec": WORKS,
        "sae.to('cpu')": WORKS,
        "sae.eval()": WORKS,
        "copy.deepcopy(sae).fold_W_dec_norm()": "not safe",
        "sae.run_with_cache(writes)": WORKS,
        "sae.run_with_hooks(writes, fwd_hooks=[('hook_sae_acts_post', double)])": WORKS,
        "sae.save_model(folder.parent / 'again')": WORKS,
        "sae.use_error_term": WORKS,
    },
    "On a model": {
        "model.run_with_saes(tokens, saes=[sae])": WORKS,
        "model.run_with_saes(tokens, saes=sae)": WORKS,
        "model.run_with_saes(tokens, saes=[sae], use_error_term=True)": WORKS,
        "model.run_with_cache_with_saes(tokens, saes=[sae])": WORKS,
        "model.run_with_cache_with_saes(tokens, saes=[sae])[1][f'{hook}.hook_sae_acts_post']": WORKS,
        "model.run_with_hooks_with_saes(tokens, saes=[sae], fwd_hooks=[(f'{hook}.hook_sae_acts_post', double)])": WORKS,
        "plain.run_with_saes(tokens, saes=[sae])": "HookedSAERecurrent",
        "model.saes(saes=[sae])": WORKS,
        "model.add_sae(sae)": WORKS,
        "model.acts_to_saes": WORKS,
        "model.reset_saes()": WORKS,
        "model.reset_saes(hook)": WORKS,
    },
    "Training": {
        "training_config(model, 2, 1)": WORKS,
        "training_config(model, 2, 1, training_tokens=4096, lr=1e-3)": WORKS,
        "training_config(model, 2, 1, sae={'k': 4})": WORKS,
        "training_config(model, 2, 1, architecture='writesae_batchtopk')": WORKS,
        "training_config(model, 2, 1, architecture='topk')": "writesae_topk",
        "training_config(model, 2, 1, training_token=4096)": "nearest: training_tokens",
        "training_config(NAME, 2, 1)": "HookedRecurrent.from_pretrained('embedded')",
        "text_dataset('nosuch.txt')": "nosuch.txt",
        "training_config(model, 0, 1)": "layer 0",
        "training_config(model, 2, 9)": "head 9",
        "training_config(model, 2, 1).to_sae_trainer_config()": WORKS,
    },
    "Their notebooks": {
        "model.run_with_saes(tokens, saes=sae)": WORKS,
        "model.run_with_hooks_with_saes(tokens, saes=sae, fwd_hooks=[(f'{hook}.hook_sae_acts_post', double)])": WORKS,
        "model.add_sae(sae, use_error_term=True)": WORKS,
        "model.set_use_split_qkv_input(True)": "no switch changes which hooks there are",
        "sae.decode(sae.encode(model.run_with_cache(tokens, names_filter=hook)[1][hook]))": WORKS,
        "sae.encode(cache[hook])": "name it in names_filter",
        "sae.W_enc / sae.W_enc.norm(dim=-1, keepdim=True)": WORKS,
        "sae.cfg.metadata.prepend_bos": WORKS,
    },
}
"""The same of SAELens."""
CALLS = {
    call: error for table in (TRANSFORMER_LENS, SAE_LENS) for part in table.values() for call, error in part.items()
}


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What calls name."""
    model = HookedSAERecurrent.from_pretrained("embedded")
    text = "The people of the United States"
    tokens = model.to_tokens(text)
    logits, cache = model.run_with_cache(tokens)
    sae = make_sae(model, hook="blocks.2.mixer.heads.1.hook_write_vec")
    folder = tmp_path_factory.mktemp("calls") / "sae"
    sae.save_model(folder)
    hook = sae.cfg.metadata.hook_name
    own = {"NAME": "embedded", "text": text, "tokens": tokens, "logits": logits, "cache": cache, "model": model}
    own |= {
        "sae": sae,
        "folder": folder,
        "hook": hook,
        "writes": model.run_with_cache(tokens, names_filter=hook)[1][hook],
    }
    own |= {"double": lambda x, hook: 2 * x, "metric": lambda logits: logits[0, -1, 5]}
    matrices = model.run_with_cache(tokens, names_filter="blocks.2.mixer.hook_write")[1]["write", 2][:, :, 1]
    own |= {"plain": HookedRecurrent.from_pretrained("embedded"), "matrices": matrices, "text_dataset": text_dataset}
    classes = {kind.__name__: kind for kind in (HookedRecurrent, Path, SAE, TrainingSAE)}
    functions = {"copy": copy, "partial": partial, "patching": patching, "torch": torch, "utils": utils}
    return classes | functions | own | {"training_config": training_config}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_works_or_says_what_to_do(names: dict[str, Any], call: str) -> None:
    model, error = names["model"], CALLS[call]
    try:
        with torch.no_grad() if "bwd" not in call else torch.enable_grad():
            if error:
                with pytest.raises(Exception, match=re.escape(error)):
                    eval(call, names)
            else:
                eval(call, names)
    finally:
        model.reset_hooks()
        model.reset_saes()


HEAD = """## Everyday calls

Which calls of TransformerLens and SAELens work on a recurrent model? `tests/test_everyday_calls.py` runs each of these,
{n} of TransformerLens and {m} of SAELens, on the embedded model. `cache` is that of a default `run_with_cache`, and
`sae` a dictionary of `hook`, the writes of one head, which `writes` holds flattened and `matrices` as K x V. `plain`
is a model of the class HookedRecurrent, and `model` of HookedSAERecurrent. Of errors a part of the message is quoted.
"""


def page() -> str:
    """docs/compatibility.md with the table of all calls at its end."""
    before = PAGE.read_text(encoding="utf-8").partition("## Everyday calls")[0].rstrip()
    parts = []
    for library, table in (("TransformerLens", TRANSFORMER_LENS), ("SAELens", SAE_LENS)):
        for part, calls in table.items():
            rows = [f"| `{call}` | {f'error: {error}' if error else 'works'} |" for call, error in calls.items()]
            parts.append("\n".join([f"### {library}: {part}\n", "| call | outcome |", "|---|---|", *rows]))
    n, m = (sum(map(len, table.values())) for table in (TRANSFORMER_LENS, SAE_LENS))
    return "\n\n".join([before, HEAD.format(n=n, m=m).rstrip(), *parts]) + "\n"


def test_the_page_has_these_calls() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
