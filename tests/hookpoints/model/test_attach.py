"""attach(): hook points on a model that someone holds, and nothing left on it."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_models import make_hf

from hookpoints import HookedRecurrent, HookpointsError, UnsupportedModelError, WriteEdit, attach
from hookpoints.errors import SelfCheckError

WRITE = "blocks.1.mixer.hook_write"


def hook_count(model: torch.nn.Module) -> int:
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return hooks + sum("forward" in m.__dict__ for m in model.modules())


def gone(write, hook):
    return torch.zeros_like(write)


@torch.no_grad()
def test_the_models_own_forward_and_generate_fire(tokens):
    """With the hooks and values of the wrapper; afterwards the model is as it was."""
    hf = make_hf()
    wrapper = HookedRecurrent.from_hf(make_hf())
    plain, plain_text = hf(tokens).logits, hf.generate(tokens, max_new_tokens=4, do_sample=False)
    before, shapes = hook_count(hf), []
    with attach(hf) as hooked:
        names = list(hooked.hook_dict)
        out, cache = hooked.run_with_cache(tokens, names_filter=names)
        _, expected = wrapper.run_with_cache(tokens, names_filter=list(wrapper.hook_dict))
        assert torch.equal(out.logits, plain) and torch.equal(hf(tokens).logits, plain)
        assert cache.keys() == expected.keys() and all(torch.equal(cache[name], expected[name]) for name in names)
        with hooked.hooks([(WRITE, lambda write, hook: shapes.append(write.shape[1]))]):
            assert torch.equal(hf.generate(tokens, max_new_tokens=4, do_sample=False), plain_text)
        assert shapes == [70, 1, 1, 1]
        with hooked.hooks([(WRITE, gone)]):
            edited = hf(tokens).logits
        assert not torch.allclose(edited, plain)
    assert hook_count(hf) == before and torch.equal(hf(tokens).logits, plain)


def test_training_mode_and_gradients_are_the_models(tokens):
    hf = make_hf().train()
    hf.model.layers[2].eval()
    modes = [module.training for module in hf.modules()]
    with attach(hf) as hooked:
        assert [module.training for module in hf.modules()] == modes
        seen = []
        with hooked.hooks(bwd_hooks=[(WRITE, lambda gradient, hook: seen.append(gradient.shape))]):
            hf(tokens, labels=tokens).loss.backward()
        assert seen == [(2, 70, 4, 8, 6)]
    assert hf.model.layers[1].linear_attn.out_proj.weight.grad.abs().max() > 0


@torch.no_grad()
def test_a_backbone_without_a_head(tokens):
    backbone = make_hf().model
    with attach(backbone) as hooked:
        out, cache = hooked.run_with_cache(tokens, names_filter=WRITE)
    assert torch.equal(out.last_hidden_state, backbone(tokens).last_hidden_state)
    assert cache[WRITE].shape == (2, 70, 4, 8, 6)


@torch.no_grad()
def test_of_a_model_of_unknown_shape_the_mixers_are_hooked(hf, tokens):
    around = torch.nn.Module()  # somebody's own, in which nothing but the recurrent layers has a known name
    for name in ("config", "forward", "get_input_embeddings", "get_output_embeddings"):
        setattr(around, name, getattr(hf, name))
    around.inside = hf
    with attach(around) as hooked:
        assert {name.split(".")[2] for name in hooked.hook_dict if "." in name} == {"mixer"}
        edited = hooked.run_with_hooks(tokens, fwd_hooks=[(WRITE, gone)]).logits
    with attach(hf) as known:
        assert torch.equal(known.run_with_hooks(tokens, fwd_hooks=[(WRITE, gone)]).logits, edited)


def test_a_refused_model_is_left_as_it_was(tokens):
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    )
    with pytest.raises(UnsupportedModelError, match="'llama' cannot be hooked: none of its layers"):
        attach(llama)
    hf = make_hf()
    before = hook_count(hf)
    hf.model.layers[1].linear_attn.forward = lambda hidden_states, **kwargs: torch.zeros_like(hidden_states)
    with pytest.raises(SelfCheckError, match="none of its ops"):
        attach(hf)
    del hf.model.layers[1].linear_attn.forward
    assert hook_count(llama) == 0 and hook_count(hf) == before


def test_detached_hooks_raise_instead_of_staying_silent(tokens):
    hooked = attach(make_hf())
    hooked.detach()
    for use in (
        lambda: hooked.add_hook(WRITE, gone),
        lambda: hooked.run_with_cache(tokens),
        lambda: hooked.edits(WriteEdit(1, 0, None, mode="delete")).__enter__(),
        lambda: hooked(tokens),
    ):
        with pytest.raises(HookpointsError, match="attach to it again"):
            use()
