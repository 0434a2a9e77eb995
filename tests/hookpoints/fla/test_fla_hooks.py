"""Hooks, edits and sessions on fla's models, on a CPU: the same tests as for transformers' models, and fla's own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conftest import VOCAB, KeepFloat64
from fla_models import MODEL_TYPES, make_fla

# The tests of transformers' models, run again on fla's.
sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("model", "hooks")]

import test_parity
from test_attribution import test_attributions_are_derivatives  # noqa: F401
from test_cache import (  # noqa: F401
    run,
    test_parts_add_up_to_the_stream,
    test_parts_behind_a_blocks_norm_are_what_its_mixer_is_given,
    test_parts_behind_the_final_norm_add_up_to_the_logits,
)
from test_heads import test_heads_times_their_weights_are_what_the_layer_adds  # noqa: F401
from test_model_types import (  # noqa: F401
    EXACT,
    by_hand,
    edit_of,
    test_edits_are_exact_in_generation,
    test_edits_are_exact_in_prefill_and_session,
    test_loops_differ_only_where_there_is_an_erase,
)
from test_parity import (  # noqa: F401
    test_listening_everywhere_is_bit_identical,
    test_reads_are_states_times_queries,
)
from test_pattern import (  # noqa: F401
    test_decoding_has_the_rows_of_the_whole,
    test_weights_times_values_are_the_reads,
)
from torch.testing import assert_close

from hookpoints import HookedRecurrent, UnsupportedModelError
from hookpoints.hooks.table import HOOKS

VALUE_FIRST = {"Gated DeltaNet", "GLA", "HGRN2", "Kimi delta attention", "SimpleGLA"}
"""Rules whose states fla keeps [B,H,V,K]."""


@pytest.fixture(scope="module", params=MODEL_TYPES)
def _hooked64(request):
    with KeepFloat64():
        return HookedRecurrent.from_hf(make_fla(request.param).double())


@pytest.fixture
def hooked64(_hooked64):
    """A float64 model, kept in float64 through upstream's casts."""
    with KeepFloat64():
        yield _hooked64


@pytest.fixture(scope="module", params=MODEL_TYPES)
def hooked(request):
    return HookedRecurrent.from_hf(make_fla(request.param))


@pytest.fixture
def sequence():
    return torch.randint(1, VOCAB, (1, 41), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_mixers_hooks_fire_with_their_shapes(hooked, tokens):
    """In prefill and at each decoded token."""
    layer = hooked.cfg.recurrent_layers[-1]
    shape, seen = hooked.cfg.layer(layer), {}
    factors = hooked.attachment.mixers[layer].rule.factor_names
    rows = [row for row in HOOKS if row.scope in ("mixer", "head") and (row.factor is None or row.factor in factors)]
    hooks = [
        (r.full_name(layer, 1), lambda x, hook: seen.setdefault(hook.name, []).append(tuple(x.shape))) for r in rows
    ]
    with hooked.hooks(hooks):
        hooked.generate(tokens, max_new_tokens=2, do_sample=False)
    sizes = {"B": 2, "H": shape.H, "K": shape.K, "V": shape.V, "R": shape.R, "F": shape.K * shape.V}
    for row in rows:
        axes = row.axes_of(shape.R).replace("(KV)", "F").split(" or ")
        lengths = ({"T": 70, "S": 70}, {"T": 1, "S": 71})
        expected = [[tuple({**sizes, **length}[axis] for axis in choice) for length in lengths] for choice in axes]
        assert seen[row.full_name(layer, 1)] in expected


@torch.no_grad()
def test_states_are_the_caches_states(hooked, tokens):
    """The last state of the trajectory is what fla's cache hands on, in the layout that its ops use."""
    names = [f"blocks.{layer}.mixer.hook_state" for layer in hooked.cfg.recurrent_layers]
    _, kept = hooked.run_with_cache(tokens, names_filter=names)
    out = hooked.hf_model(tokens, use_cache=True)
    for layer, name in zip(hooked.cfg.recurrent_layers, names, strict=True):
        state = out.past_key_values[layer]["recurrent_state"]
        state = state.mT if hooked.cfg.layer(layer).rule in VALUE_FIRST else state
        assert_close(state, kept[name][:, -1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_factors_can_be_fed(hooked, tokens):
    """Doubling v doubles the writes; removing the decay keeps the state's norm where nothing is erased."""
    prefix = f"blocks.{hooked.cfg.recurrent_layers[0]}.mixer."
    _, plain = hooked.run_with_cache(tokens, names_filter=[prefix + "hook_write", prefix + "hook_read"])
    with hooked.hooks([(prefix + "hook_v", lambda x, hook: 2 * x)]):
        _, doubled = hooked.run_with_cache(tokens, names_filter=[prefix + "hook_write", prefix + "hook_read"])
    for name in ("hook_write", "hook_read"):  # both are linear in the values
        assert_close(doubled[prefix + name], 2 * plain[prefix + name], rtol=1e-4, atol=1e-5)
    rule = hooked.attachment.mixers[0].rule
    if "log_decay" in rule.factor_names and rule.name not in ("Comba", "RWKV-7"):  # which erase beside the decay
        with hooked.hooks([(prefix + "hook_log_decay", lambda x, hook: torch.full_like(x, -50.0))]):
            _, forgetful = hooked.run_with_cache(tokens, names_filter=[prefix + "hook_write", prefix + "hook_state"])
        assert_close(forgetful[prefix + "hook_state"], forgetful[prefix + "hook_write"], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_stop_and_start_meet(hooked, tokens):
    if hooked.cfg.model_type != "rwkv7":
        test_parity.test_stop_and_start_meet(hooked, tokens)
        return
    residual = hooked(tokens, stop_at_layer=1)  # fla's class; from_pretrained takes another
    with pytest.raises(UnsupportedModelError, match=r"cannot start at layer 1 .*from_pretrained"):
        hooked(residual, start_at_layer=1, tokens=tokens)
    assert torch.equal(hooked(hooked(tokens, stop_at_layer=0), start_at_layer=0, tokens=tokens), hooked(tokens))


@torch.no_grad()
def test_what_is_added_is_what_the_block_adds(hooked, tokens):
    """To what enters the block; fla's RWKV models norm the embeddings at the beginning of the first."""
    _, cache = hooked.run_with_cache(tokens)
    for layer, block in enumerate(hooked.attachment.layout.blocks):
        total = cache[f"blocks.{layer}.hook_resid_pre"]
        if hasattr(block.block, "pre_norm"):
            total = block.block.pre_norm(total)
        total = total + cache[f"blocks.{layer}.hook_attn_out"] + cache[f"blocks.{layer}.hook_mlp_out"]
        assert_close(total, cache[f"blocks.{layer}.hook_resid_post"], rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_hook(hooked, tokens):
    """fla's kernels have backward kernels of their own; here torch differentiates the substitutes."""
    prefix = "blocks.1.mixer."
    grads = {}
    names = [prefix + "hook_k", prefix + "hook_v", "blocks.0.hook_resid_pre"]
    logits = None
    with hooked.hooks([], [(name, lambda g, hook: grads.__setitem__(hook.name, g)) for name in names]):
        logits = hooked(tokens[:, :12])
        logits.float().log_softmax(-1)[..., 3].sum().backward()
    hooked.hf_model.zero_grad()
    for name in names:
        assert grads[name].abs().max() > 0
