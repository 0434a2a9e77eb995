"""Hooked is plain, bit by bit, while nobody edits, and hooks see what the model does; fla's families: oracles.

The logits of hookpoints' own kernels, of every family: ``tests/test_families.py``."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import MAKERS, make_hf
from torch.testing import assert_close

from hookpoints import HookedRecurrent, UnsupportedModelError
from hookpoints.fla import is_fla
from hookpoints.model.inputs import cache_argument, cache_of, continuing

VALUE_FIRST = {
    False: {"Mamba-1", "Mamba-2"},
    True: {"Gated DeltaNet", "GLA", "HGRN2", "Kimi delta attention", "SimpleGLA"},
}
"""Whether a model is fla's -> rules whose states its cache keeps [B,H,V,K]."""


def left_padding(tokens: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0
    return mask


@pytest.mark.parametrize("hooked", sorted(MAKERS), indirect=True)
@torch.no_grad()
def test_hooked_is_plain(hooked, tokens):
    """Bit by bit, while nobody listens, in every family."""
    plain = make_hf(hooked.cfg.model_type.removesuffix("_text"))
    for mask in (None, left_padding(tokens)):
        assert torch.equal(hooked(tokens, attention_mask=mask), plain(tokens, attention_mask=mask).logits)


@torch.no_grad()
def test_listening_changes_nothing(hooked, tokens):
    """Bit by bit, with a listener on every hook; every hook fires."""
    for mask in (None, left_padding(tokens)):
        logits, cache = hooked.run_with_cache(tokens, attention_mask=mask, names_filter=lambda name: True)
        assert torch.equal(logits, hooked(tokens, attention_mask=mask))
        assert set(cache.keys()) == set(hooked.hook_dict)
    with torch.inference_mode():
        assert torch.equal(hooked(tokens), hooked.hf_model(tokens).logits)


@torch.no_grad()
def test_reads_are_queries_times_states_and_the_last_is_the_caches(hooked, tokens):
    """What the reference makes of the factors, against what upstream's op and cache have."""
    layer, of_fla = hooked.cfg.recurrent_layers[-1], is_fla(hooked.hf_model)
    names = [f"blocks.{layer}.mixer.{name}" for name in ("hook_state", "hook_read")]
    _, kept = hooked.run_with_cache(tokens, names_filter=names)
    reference = hooked.recurrence(tokens, layer)
    reads, states = reference.outputs(method="reference"), reference.states(method="reference")
    assert_close(kept[names[1]], reads, rtol=1e-4, atol=2e-6 * max(1.0, float(reads.abs().max())))
    assert_close(kept[names[0]], states, rtol=1e-4, atol=1e-5)
    cache = cache_of(hooked.hf_model(tokens, use_cache=True))
    native = cache[layer]["recurrent_state"] if of_fla else cache.layers[layer].recurrent_states[0]
    native = native.mT if hooked.cfg.layer(layer).rule in VALUE_FIRST[of_fla] else native
    assert_close(states[:, -1], native.reshape_as(states[:, -1]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_decoding_continues_the_prompt(hooked, tokens):
    """Token by token from a cache: logits and writes are those of the whole, and listening changes no bit."""
    names = [f"blocks.{layer}.mixer.hook_write" for layer in hooked.cfg.recurrent_layers]
    whole, kept = hooked.run_with_cache(tokens, names_filter=names)
    heard, argument = cache_of(hooked.hf_model(tokens[:, :65], use_cache=True)), cache_argument(hooked.hf_model)
    plain, slack = copy.deepcopy(heard), 1 if is_fla(hooked.hf_model) else 10
    for t in range(65, 70):
        token = tokens[:, t : t + 1]
        how = continuing(hooked.hf_model, None, t, token)
        step, at_t = hooked.run_with_cache(
            token, names_filter=lambda name: "mixer." in name, **{argument: heard}, **how
        )
        assert torch.equal(step, hooked(token, **{argument: plain}, **how))
        assert_close(step[:, 0], whole[:, t], rtol=0, atol=2e-5 * slack)
        for name in names:
            assert_close(at_t[name][:, 0], kept[name][:, t], rtol=1e-3, atol=1e-5 * slack)


@torch.no_grad()
def test_stop_and_start_meet(hooked, tokens):
    plain = hooked(tokens)
    for layer in range(hooked.cfg.n_layers):
        if not hooked.attachment.layout.is_chain:
            with pytest.raises(UnsupportedModelError, match="no chain"):
                hooked(tokens, stop_at_layer=layer)
            continue
        residual = hooked(tokens, stop_at_layer=layer)
        assert residual.shape == (*tokens.shape, hooked.cfg.d_model)
        if layer and hooked.attachment.layout.first_block_feeds_all:  # fla's RWKV-7; from_pretrained takes another
            with pytest.raises(UnsupportedModelError, match="cannot start at layer"):
                hooked(residual, start_at_layer=layer, tokens=tokens)
        else:
            assert torch.equal(hooked(residual, start_at_layer=layer, tokens=tokens), plain)


@torch.no_grad()
@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [
        ("qwen3_5", torch.float64),
        ("qwen3_5", torch.bfloat16),
        ("falcon_h1", torch.bfloat16),
        ("falcon_mamba", torch.bfloat16),
        ("rwkv7", torch.bfloat16),
    ],
)
def test_other_dtypes_are_bit_identical(model_type, dtype, tokens):
    plain, model = make_hf(model_type).to(dtype), HookedRecurrent.from_hf(make_hf(model_type).to(dtype))
    listened, cache = model.run_with_cache(tokens, names_filter=lambda name: True)
    assert torch.equal(listened, plain(tokens).logits)
    assert listened.dtype == plain(tokens).logits.dtype and cache["blocks.0.hook_resid_pre"].dtype == dtype
    with model.hooks([(lambda name: True, lambda x, hook: None)]):
        out = model.generate(tokens, max_new_tokens=3, do_sample=False)
    assert torch.equal(out, plain.generate(tokens, max_new_tokens=3, do_sample=False))


@torch.no_grad()
def test_several_tokens_after_a_cache_continue_it_in_mamba1(tokens):
    """Upstream's own layers begin their states with zeros."""
    plain, hooked = make_hf("mamba"), HookedRecurrent.from_hf(make_hf("mamba"))
    whole = plain(tokens).logits[:, 40:]
    for hf, follows in ((plain, False), (hooked.hf_model, True)):
        after = continuing(hf, cache_of(hf(tokens[:, :40], use_cache=True)), 40, tokens[:, 40:])
        assert torch.allclose(hf(tokens[:, 40:], **after).logits, whole, rtol=0, atol=5e-5) is follows
