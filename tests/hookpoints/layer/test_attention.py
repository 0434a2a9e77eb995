"""Hooks of softmax attention: what they see is what upstream and TransformerLens compute, and edits of it act."""

from __future__ import annotations

import inspect
from collections import defaultdict
from operator import attrgetter

import pytest
import torch
import transformers.models.qwen3_5.modeling_qwen3_5 as upstream
from tiny_models import MAKERS, fast_of, make_hf
from torch.testing import assert_close
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

from hookpoints import HookedRecurrent, UnsupportedModelError, attach
from hookpoints.layer.intercept import open_handlers

OPTIONS = {
    "lara_mini": {"sliding_window": 8, "layer_types": ["linear_attention", "sliding_attention", "full_attention"]},
    "nemotron_h": {"num_attention_heads": 4, "num_key_value_heads": 2},
}
PATTERN_ALONE = ("bailing_hybrid", "glm5_next_text", "kimi_linear", "qwen4_exp_text")
KINDS = (
    "falcon_h1",
    "kimi_linear",
    "lara_mini",
    "nemotron_h",
    "olmo_hybrid",
    "qwen3_5",
    "qwen4_exp",
    "zamba2",
)
"""Plain, latent, with windows, with groups, with norms of queries and keys, gated, with an index, and shared."""


def hooks_of(model: HookedRecurrent, kind: str = "") -> list[str]:
    return [name for name in model.hook_dict if ".attn.hook_" + kind in name]


@pytest.fixture(scope="module", params=fast_of(KINDS, MAKERS.keys() - {"falcon_mamba", "mamba", "mamba2", "rwkv7"}))
def family(request):
    return HookedRecurrent.from_hf(make_hf(request.param, **OPTIONS.get(request.param, {})))


def test_pattern_times_values_is_what_attention_computes(family, tokens, monkeypatch):
    """With padding on the left, and windows of 8 tokens in one family. Attention that makes queries, keys and values
    otherwise (latent, or with an index of tokens) has a pattern alone."""
    mask = (torch.arange(tokens.shape[1]) >= torch.tensor([[0], [9]])).long()
    plain, calls, native = family(tokens, attention_mask=mask), [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda query, key, value, **how: calls.append((value, native(query, key, value, **how))) or calls[-1][1],
    )
    logits, cache = family.run_with_cache(tokens, names_filter=hooks_of(family), attention_mask=mask)
    assert torch.equal(logits, plain)  # with gradients on, where what hooks are given is passed on
    for name, (value, output) in zip(hooks_of(family, "pattern"), calls, strict=True):
        groups, own = output.shape[1] // value.shape[1], name.replace("pattern", "v")
        assert_close(cache["pattern", int(name.split(".")[1])] @ value.repeat_interleave(groups, 1), output)
        assert (own in cache) == (family.cfg.model_type not in PATTERN_ALONE)
        # upstream may have repeated the value for each head
        assert own not in cache or torch.equal(
            cache[own].transpose(1, 2), value[:, :: value.shape[1] // cache[own].shape[2]]
        )


@torch.no_grad()
def test_edits_act_at_every_step_of_generation(family, tokens):
    """Passes from a cache read and make what one pass over all tokens does, which later tokens see."""
    seen = defaultdict(list)
    see_and_be_blind_to_the_token_itself = (
        lambda x, hook: seen[hook.name].append(x),
        lambda x, hook: x.tril(x.shape[3] - x.shape[2] - 1),
    )
    hooks = [(name, lambda x, hook: x.flip(-1)) for part in "qkv" for name in hooks_of(family, part)]
    hooks += [(name, act) for name in hooks_of(family, "pattern") for act in see_and_be_blind_to_the_token_itself]
    with family.hooks(hooks):
        out = family.generate(tokens[:, :12], do_sample=False, max_new_tokens=6, min_new_tokens=6)
        logits = family(out)
    assert torch.equal(logits[:, 11:-1].argmax(-1), out[:, 12:]) and not torch.allclose(logits, family(out), atol=1e-2)
    for _prompt, *steps, whole in seen.values():
        for t, step in enumerate(steps, start=12):
            assert_close(step[:, :, 0], whole[:, :, t, t + 1 - step.shape[3] : t + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", sorted({"bamba", "falcon_h1", "olmo_hybrid", "qwen3_5", "qwen3_next"} & MAKERS.keys()))
@pytest.mark.filterwarnings("ignore::hookpoints.errors.BridgeWarning")
@torch.no_grad()
def test_values_are_transformer_lenss(kind, tokens):
    model, hf = HookedRecurrent.from_hf(make_hf(kind, attn_implementation="eager")), make_hf(kind)
    _, cache = model.run_with_cache(tokens, names_filter=hooks_of(model))
    bridge, theirs = build_bridge_from_module(hf, type(hf).__name__, hf_config=hf.config), {}
    with attach(bridge):  # TransformerLens' own Gated DeltaNet does not run in every version of transformers
        for name in cache:
            attrgetter(name)(bridge).add_hook(lambda value, hook, name=name: theirs.update({name: value}))
        bridge(tokens)
    for name, value in cache.items():  # of gated attention, its heads of queries and of gates take turns
        assert_close(value, theirs[name][:, :, :: theirs[name].shape[2] // value.shape[2]], rtol=0, atol=2e-6)


@torch.no_grad()
def test_the_table_of_functions_is_put_back_and_one_of_unknown_masks_is_refused(tokens, monkeypatch):
    table, hf = inspect.unwrap(upstream.ALL_ATTENTION_FUNCTIONS), make_hf()  # other tests' models hold it wrapped
    monkeypatch.setattr(upstream, "ALL_ATTENTION_FUNCTIONS", table)
    with attach(hf) as hooked:
        hf.config._attn_implementation = "flash_attention_2"
        with pytest.raises(UnsupportedModelError, match="flash_attention_2"):
            hooked.run_with_cache(tokens, names_filter="blocks.3.attn.hook_pattern")
    assert upstream.ALL_ATTENTION_FUNCTIONS is table and not open_handlers()
