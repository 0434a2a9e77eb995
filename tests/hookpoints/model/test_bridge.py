"""attach() on a TransformerLens TransformerBridge."""

from __future__ import annotations

import tomllib
import warnings
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import cast

import pytest
import torch
from tiny_models import _MODELS, MAKERS, make_hf
from torch.testing import assert_close
from transformer_lens.factories import architecture_adapter_factory
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

from hookpoints import HookedRecurrent, UnknownHookError, WriteEdit, as_bridge, attach
from hookpoints.errors import BridgeWarning, HookpointsError, UnsupportedModelError
from hookpoints.model.bridge import RecurrentAdapter

MIXER = "blocks.1.mixer."
GROUP = "transformer_lens.architectures"
PROJECT = tomllib.loads((Path(__file__).parents[3] / "hookpoints/pyproject.toml").read_text())["project"]
ENTRIES = PROJECT["entry-points"][GROUP]
OPTIONS = {"nemotron_h": {"layers_block_type": ["mlp", "linear_attention", "full_attention"]}}


def bridge_of(hf: torch.nn.Module) -> TransformerBridge:
    return build_bridge_from_module(hf, type(hf).__name__, hf_config=hf.config)


def zero(value, hook):
    return torch.zeros_like(value)


@pytest.fixture(params=["mamba2", "nemotron_h", "qwen3_5", "falcon_h1"])
def attached(request):
    """A pure Mamba-2, two with attention; and Gated DeltaNet, which TransformerLens computes by a copy of its
    forward."""
    options = OPTIONS.get(request.param, {})
    bridge = bridge_of(make_hf(request.param, **options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BridgeWarning)
        hooked = attach(bridge)
    yield hooked, bridge, HookedRecurrent.from_hf(make_hf(request.param, **options))
    hooked.detach()


@torch.no_grad()
def test_hooks_are_the_models_own(attached, tokens):
    hooked, bridge, wrapper = attached
    expected_logits, expected = wrapper.run_with_cache(tokens, names_filter=list(hooked.hook_dict))
    logits, cache = hooked.run_with_cache(tokens, names_filter=list(hooked.hook_dict))
    assert_close(logits, expected_logits, rtol=0, atol=5e-6)
    assert MIXER + "heads.0.hook_write_vec" in cache
    for name, value in cache.items():
        assert torch.allclose(value, expected[name], rtol=1e-4, atol=1e-5), name
    with pytest.raises(HookpointsError, match=r"bridge\.run_with_cache"):
        cache.decompose_resid()
    assert MIXER + "hook_read" not in bridge.run_with_cache(tokens)[1]


def assert_edits_act(hooked, bridge, wrapper, layer: int, tokens, run_with_hooks) -> None:
    """Zeroed writes, by a hook and by edits of every head, are those of the wrapper."""
    plain, edit = bridge(tokens), [(f"blocks.{layer}.mixer.hook_write", zero)]
    expected = wrapper.run_with_hooks(tokens, fwd_hooks=edit)
    assert not torch.allclose(expected, plain, atol=1e-3)
    assert_close(run_with_hooks(edit), expected, rtol=0, atol=2e-5)
    with hooked.edits([WriteEdit(layer, head, None, mode="delete") for head in range(hooked.cfg.layer(layer).H)]):
        assert_close(bridge(tokens), expected, rtol=0, atol=2e-5)
    assert torch.equal(bridge(tokens), plain)


@torch.no_grad()
def test_edits_and_hooks_act_where_the_bridge_runs(attached, tokens):
    hooked, bridge, wrapper = attached
    seen = []

    def run_with_hooks(edit):
        own = [("blocks.1.hook_in", lambda value, hook: seen.append(hook.name))]
        with hooked.hooks(edit):
            return bridge.run_with_hooks(tokens, fwd_hooks=own)

    assert_edits_act(hooked, bridge, wrapper, 1, tokens, run_with_hooks)
    assert seen == ["blocks.1.hook_in"]
    with pytest.raises(UnknownHookError, match=f"nearest: {MIXER}hook_write"):
        hooked.run_with_hooks(tokens, fwd_hooks=[(MIXER + "hook_writ", zero)])


@torch.no_grad()
@pytest.mark.parametrize(
    "name", [name for name in sorted(MAKERS.keys() & _MODELS) if f"{_MODELS[name][0]}ForCausalLM" in ENTRIES]
)
def test_a_bridge_of_a_class_that_transformer_lens_lacks_has_these_hooks(name, tokens, monkeypatch):
    """It is found as TransformerLens finds it: by the entry points of the package."""
    points = [EntryPoint(*entry, GROUP) for entry in ENTRIES.items()]
    monkeypatch.setattr(architecture_adapter_factory, "entry_points", lambda group: points if group == GROUP else [])
    factory = architecture_adapter_factory.ArchitectureAdapterFactory
    monkeypatch.setattr(factory, "_adapters", dict(architecture_adapter_factory.SUPPORTED_ARCHITECTURES))
    monkeypatch.setattr(factory, "_entry_points_discovered", False)  # an own adapter would be a warning, so an error
    plain, bridge, wrapper = (
        make_hf(name)(tokens).logits,
        bridge_of(make_hf(name)),
        HookedRecurrent.from_hf(make_hf(name)),
    )
    layer = wrapper.cfg.recurrent_layers[1]
    (logits, cache), mixer = bridge.run_with_cache(tokens), f"blocks.{layer}.mixer."
    vector = mixer + "heads.0.hook_write_vec"
    assert torch.equal(bridge(tokens), plain) and torch.equal(logits, plain)
    assert_close(cache[vector], wrapper.run_with_cache(tokens, names_filter=vector)[1][vector])

    def run_with_hooks(edit):
        return bridge.run_with_hooks(tokens, fwd_hooks=edit)

    assert_edits_act(bridge.adapter.hooked, bridge, wrapper, layer, tokens, run_with_hooks)


@torch.no_grad()
def test_a_model_as_a_bridge_shares_its_weights_and_stays_as_it_is(hooked, tokens):
    if not hooked.attachment.layout.is_chain:
        with pytest.raises(UnsupportedModelError, match="one residual stream"):
            as_bridge(hooked)
        return
    expected, bridge = hooked(tokens), as_bridge(hooked)
    theirs = {id(parameter) for parameter in bridge.original_model.parameters()}
    assert theirs >= {id(parameter) for parameter in hooked.hf_model.parameters()}
    logits, cache = bridge.run_with_cache(tokens)
    assert torch.equal(logits, expected)
    stream = cache[f"blocks.{hooked.cfg.n_layers - 1}.hook_out"]
    of_lens = bridge.unembed(bridge.ln_final(stream))  # as lenses make logits
    assert_close(bridge.adapter.apply_output_logits_transform(of_lens), expected, rtol=0, atol=1e-5)
    edit = WriteEdit(hooked.cfg.recurrent_layers[1], 0, 5, mode="delete")
    with cast(RecurrentAdapter, bridge.adapter).hooked.edits(edit):
        edited = bridge(tokens)
        assert torch.equal(hooked(tokens), expected)
    with hooked.edits(edit):
        assert torch.equal(edited, hooked(tokens)) and not torch.equal(edited, expected)
        assert torch.equal(bridge(tokens), expected)
