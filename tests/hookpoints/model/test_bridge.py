"""attach() on a TransformerLens TransformerBridge."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from conftest import make_hf
from torch.testing import assert_close
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

from hookpoints import HookedRecurrent, UnknownHookError, WriteEdit, attach
from hookpoints.errors import BridgeWarning, HookDidNotFireError, HookpointsError, SelfCheckError
from hookpoints.model import loading
from hookpoints.model.bridge import without_bridge

LAYER = 1
MIXER = f"blocks.{LAYER}.mixer."
BRIDGED = ["mamba2", "nemotron_h", "qwen3_5"]
"""A pure Mamba-2, one with attention; and Gated DeltaNet, which TransformerLens computes by a copy of its forward."""


def bridge_of(hf: torch.nn.Module) -> TransformerBridge:
    return build_bridge_from_module(hf, type(hf).__name__, hf_config=hf.config)


def zero(value, hook):
    return torch.zeros_like(value)


@pytest.fixture(params=BRIDGED)
def attached(request):
    model_type = request.param
    options = {"layers_block_type": ["mlp", "linear_attention", "full_attention"]} if model_type == "nemotron_h" else {}
    bridge = bridge_of(make_hf(model_type, **options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BridgeWarning)
        hooked = attach(bridge)
    yield hooked, bridge, make_hf(model_type, **options)
    hooked.detach()


@torch.no_grad()
def test_the_bridges_own_methods_show_the_recurrent_hooks(attached, tokens):
    _, bridge, hf = attached
    plain = hf(tokens).logits
    wrapper = HookedRecurrent.from_hf(hf)
    names = [name for name in wrapper.hook_dict if name.startswith(MIXER)]
    _, expected = wrapper.run_with_cache(tokens, names_filter=names)
    logits, cache = bridge.run_with_cache(tokens)
    assert_close(logits, plain, rtol=0, atol=5e-6)
    assert MIXER + "hook_read" in cache and MIXER + "hook_write" not in cache and "blocks.0.hook_in" in cache
    _, cache = bridge.run_with_cache(tokens, names_filter=[*names, "blocks.0.hook_in"])
    assert set(cache) == {*names, "blocks.0.hook_in"}
    assert all(_close(cache[name], expected[name]) for name in names)
    _, cache = bridge.run_with_cache(tokens, names_filter=names, pos_slice=(3, 5), return_cache_object=False)
    for name in names:  # a pattern is [B,H,T,S], with the head before the position
        at = (slice(None), slice(None), slice(3, 5)) if name.endswith("pattern") else (slice(None), slice(3, 5))
        assert _close(cache[name], expected[name][at])


def _close(found, expected):
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_bridge_runs_the_rwkv7_that_ships_here(tokens):
    hf = make_hf("rwkv7")
    plain = hf(tokens).logits
    assert_close(bridge_of(hf)(tokens), plain, rtol=0, atol=5e-6)


@torch.no_grad()
def test_edits_through_the_bridge_are_the_wrappers(attached, tokens):
    hooked, bridge, hf = attached
    plain, wrapper = bridge(tokens), HookedRecurrent.from_hf(hf)
    edit = [(MIXER + "hook_write", zero)]
    expected = wrapper.run_with_hooks(tokens, fwd_hooks=edit)
    assert not torch.allclose(expected, plain, atol=1e-3)
    seen = []
    both = [*edit, (f"blocks.{LAYER}.hook_in", lambda value, hook: seen.append(hook.name))]
    assert_close(bridge.run_with_hooks(tokens, fwd_hooks=both), expected, rtol=0, atol=2e-5)
    with bridge.hooks(fwd_hooks=both):
        assert_close(bridge(tokens), expected, rtol=0, atol=2e-5)
    assert seen == [f"blocks.{LAYER}.hook_in"] * 2
    bridge.add_hook(MIXER + "hook_write", zero)
    assert_close(bridge(tokens), expected, rtol=0, atol=2e-5)
    bridge.reset_hooks()
    assert torch.equal(bridge(tokens), plain)
    heads = hooked.cfg.layer(LAYER).H
    with hooked.edits([WriteEdit(LAYER, head, None, mode="delete") for head in range(heads)]):
        assert_close(bridge(tokens), expected, rtol=0, atol=2e-5)


def test_gradients_through_the_bridge(attached, tokens):
    _, bridge, _ = attached
    name = MIXER + "hook_write"
    _, cache = bridge.run_with_cache(tokens, return_type="loss", incl_bwd=True, names_filter=[name])
    assert cache[name + "_grad"].shape == cache[name].shape and cache[name + "_grad"].abs().max() > 0


@torch.no_grad()
def test_names_that_nobody_knows_raise(attached, tokens):
    _, bridge, _ = attached
    for call in (
        lambda: bridge.run_with_hooks(tokens, fwd_hooks=[(MIXER + "hook_writ", zero)]),
        lambda: bridge.run_with_cache(tokens, names_filter=MIXER + "hook_writ"),
        lambda: bridge.hooks(fwd_hooks=[(MIXER + "hook_writ", zero)]).__enter__(),
        lambda: bridge.add_hook(MIXER + "hook_writ", zero),
    ):
        with pytest.raises(UnknownHookError, match=f"nearest: {MIXER}hook_write"):
            call()
    with pytest.raises(UnknownHookError, match="matches no hook of the bridge"):
        bridge.run_with_hooks(tokens, fwd_hooks=[(lambda name: False, zero)])
    with pytest.raises(HookDidNotFireError, match="never fired"):
        bridge.run_with_hooks(tokens, fwd_hooks=[(MIXER + "hook_write", zero)], stop_at_layer=LAYER)


def test_saelens_bridge_refuses_saes_on_recurrent_hooks(tokens):
    """SAELens' bridge would go on without the SAE; on the bridge's own hooks it runs one."""
    lens = pytest.importorskip("sae_lens", reason="SAELens needs TransformerLens 3")
    bridge = bridge_of(make_hf("mamba2"))
    bridge.__class__, bridge._acts_to_saes, bridge._transcoder_output_hooks = lens.SAETransformerBridge, {}, {}
    sae = lens.StandardSAE(lens.StandardSAEConfig(d_in=bridge.cfg.d_model, d_sae=4))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", BridgeWarning)
        with attach(bridge):
            for name, error in ((MIXER + "heads.0.hook_write_vec", HookpointsError), ("nowhere", UnknownHookError)):
                sae.cfg.metadata.hook_name = name
                with pytest.raises(error):
                    bridge.run_with_saes(tokens, saes=[sae])
            plain, sae.cfg.metadata.hook_name = bridge(tokens), f"blocks.{LAYER}.hook_out"
            assert not torch.allclose(bridge.run_with_saes(tokens, saes=[sae]), plain)
    assert "add_sae" not in bridge.__dict__


@torch.no_grad()
def test_nothing_is_left_on_the_bridge(attached, tokens):
    hooked, bridge, hf = attached
    plain = bridge_of(hf)
    before = {name for name in plain.__dict__ if callable(plain.__dict__[name])}
    assert any("forward" in module.__dict__ for module in bridge.original_model.modules())
    hooked.detach()
    assert {name for name in bridge.__dict__ if callable(bridge.__dict__[name])} == before
    assert not any("forward" in module.__dict__ for module in bridge.original_model.modules())


def test_hooks_that_cannot_fire_while_attached_raise():
    """TransformerLens computes Gated DeltaNet by a copy of its forward, which the attached bridge does not run."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        hooked = attach(bridge := bridge_of(make_hf()))
    said = " ".join(str(warning.message) for warning in seen if warning.category is BridgeWarning)
    if "its own forward of" not in said:
        pytest.skip("on this transformers TransformerLens runs upstream's forward")
    assert re.search(r"its own forward of Qwen3_5GatedDeltaNet .* hooks inside them, such as", said)
    with pytest.raises(HookDidNotFireError, match=r"linear_attn\.hook_beta cannot fire while hookpoints is attached"):
        bridge.add_hook("blocks.0.linear_attn.hook_beta", zero)
    hooked.detach()


@torch.no_grad()
def test_a_bridge_that_decodes_wrongly_is_measured(tokens):
    """Told by running bridge and model, not by a list of versions."""
    bridge = bridge_of(make_hf("mamba2"))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        attach(bridge).detach()
    said = " ".join(str(warning.message) for warning in seen if warning.category is BridgeWarning)
    whole = bridge.generate(tokens[:1], max_new_tokens=8, do_sample=False, stop_at_eos=False, verbose=False)
    right = make_hf("mamba2").generate(tokens[:1], max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert ("bridge.generate with a cache" in said) == (not torch.equal(whole, right))


@torch.no_grad()
def test_a_bridge_whose_logits_are_wrong_warns(monkeypatch):
    bridge = bridge_of(make_hf("mamba2"))
    head = bridge.unembed
    handle = head.register_forward_hook(lambda module, args, out: 1.01 * out)
    with pytest.warns(BridgeWarning, match=r"a pass over a prompt gives other logits .* \(relative RMS 1.0e-02\)"):
        attach(bridge).detach()
    handle.remove()


@torch.no_grad()
def test_a_bridge_that_cannot_run_says_so():
    bridge = bridge_of(make_hf("mamba2"))
    bridge.blocks[0].norm.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(AttributeError("renamed")))
    with pytest.raises(SelfCheckError, match=r"cannot run Mamba2ForCausalLM .*AttributeError: renamed"):
        attach(bridge)
    assert "run_with_cache" not in bridge.__dict__


@torch.no_grad()
def test_without_bridge_is_the_model_as_it_was(tokens):
    hf = make_hf("falcon_h1")
    plain, names = hf(tokens).logits, [name for name, _ in hf.named_modules()]
    bridge_of(hf)
    bridged = [name for name, _ in hf.named_modules()]
    with without_bridge(hf):
        assert [name for name, _ in hf.named_modules()] == names
        assert torch.equal(hf(tokens).logits, plain)
    assert [name for name, _ in hf.named_modules()] == bridged != names


@torch.no_grad()
def test_booted_from_a_model_in_hand():
    """As the documentation shows it: the embedded model, its tokenizer, no network."""
    loaded = loading.load("embedded", device="cpu")
    bridge = TransformerBridge.boot_transformers("embedded", hf_model=loaded.model, tokenizer=loaded.tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BridgeWarning)
        with attach(bridge):
            logits, cache = bridge.run_with_cache("The state of the Union", names_filter=MIXER + "hook_write")
    assert cache[MIXER + "hook_write"].shape[:2] == logits.shape[:2]
