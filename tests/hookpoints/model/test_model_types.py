"""Hooks and edits on whole models of every type: layouts, multipliers, decoding, exactness."""

from __future__ import annotations

import pytest
import torch
from conftest import MAKERS, VOCAB, KeepFloat64, continuing, hooked_in_float64, make_hf
from torch.testing import assert_close

from hookpoints import HookedRecurrent, WriteEdit
from hookpoints.hooks.table import HOOKS
from hookpoints.model.inputs import cache_of
from hookpoints.model.layout import rule_of

EXACT = {"rtol": 0, "atol": 1e-10}
MODEL_TYPES = sorted(set(MAKERS) - {"qwen3_5", "qwen3_5_moe", "qwen3_next", "olmo_hybrid"})
"""Those that the tests of hooks and edits do not cover."""


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module", params=MODEL_TYPES)
def _hooked64(request):
    return hooked_in_float64(request.param)


@pytest.fixture
def hooked64(_hooked64):
    """A float64 model, kept in float64 through upstream's casts."""
    with KeepFloat64():
        yield _hooked64


@pytest.fixture(scope="module")
def sequence():
    return torch.randint(1, VOCAB, (1, 41), generator=torch.Generator().manual_seed(3))


def edit_of(model: HookedRecurrent, layer: int, position: int | None, **options) -> WriteEdit:
    shape = model.cfg.layer(layer)
    return WriteEdit(layer, 1, position, normal(0, 2, shape.K), normal(1, 2, shape.V), **options)


def by_hand(model: HookedRecurrent, tokens: torch.Tensor, edit: WriteEdit) -> torch.Tensor:
    """A full run with the write changed at its hook."""
    assert edit.keys is not None and edit.values is not None
    new = edit.keys.T @ edit.values

    def hook(write, hook):
        write = write.clone()
        at = slice(None) if edit.position is None else edit.position
        write[:, at] = write[:, at] + new if edit.mode == "add" else new.expand_as(write[:, at])
        return write

    name = f"blocks.{edit.layer}.mixer.heads.{edit.head}.hook_write"
    return model.run_with_hooks(tokens, fwd_hooks=[(name, hook)])


@torch.no_grad()
def test_edits_are_exact_in_prefill_and_session(hooked64, sequence):
    """Against the write replaced by hand; every recurrent layer; the first, a middle and the last token, and all."""
    for layer in hooked64.cfg.recurrent_layers:
        session = hooked64.edit_session(sequence)
        for position in (0, 40, None):
            edit = edit_of(hooked64, layer, position, mode="replace")
            expected = by_hand(hooked64, sequence, edit)
            unread = position == 40 and hooked64.recurrence(sequence, layer).read_before_write
            assert torch.allclose(expected, session.logits, rtol=0, atol=1e-6) is bool(unread)
            with hooked64.edits(edit):
                assert_close(hooked64(sequence), expected, **EXACT)
            run = session.run([[], edit])
            assert_close(run.logits[1], expected[0, run.start :], **EXACT)
            assert_close(run.logits[0], session.logits[0, run.start :], **EXACT)


@torch.no_grad()
def test_edits_are_exact_in_generation(hooked64, sequence):
    """In the prompt, among generated tokens, everywhere; each generated token is the full run's."""
    prompt = sequence[:, :20]
    for position in (10, 22, None):
        edit = edit_of(hooked64, hooked64.cfg.recurrent_layers[0], position)
        out = hooked64.generate(
            prompt, edits=edit, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        whole = by_hand(hooked64, out.sequences, edit)
        assert_close(torch.stack(out.logits, 1).double(), whole[:, 19:-1], rtol=0, atol=1e-6)
        assert_close(whole[0, 19:-1].argmax(-1), out.sequences[0, 20:])


@torch.no_grad()
def test_loops_differ_only_where_there_is_an_erase(hooked64, sequence):
    layer = hooked64.cfg.recurrent_layers[0]
    runs = {}
    for loop in ("closed", "open"):
        with hooked64.edits(edit_of(hooked64, layer, 12, loop=loop)):
            runs[loop] = hooked64(sequence)
    if hooked64.recurrence(sequence, layer).b is None:
        assert torch.equal(runs["closed"], runs["open"])
    else:
        assert not torch.allclose(runs["closed"], runs["open"], rtol=0, atol=1e-6)


@pytest.fixture
def hooked(any_hf):
    model = HookedRecurrent.from_hf(any_hf)
    yield model
    model.attachment.detach()


@torch.no_grad()
def test_listening_while_decoding_is_bit_identical(hooked, tokens):
    """Token by token: logits and the cache's states, with a listener on every hook of the mixers."""
    caches, logits = [], []
    for listens in (False, True):
        out, steps = hooked.hf_model(tokens[:, :7], use_cache=True), []
        for t in range(7, 12):
            inputs = {"position_ids": torch.full((2, 1), t), "use_cache": True, **continuing(hooked.hf_model, out)}
            if listens:
                step, kept = hooked.run_with_cache(tokens[:, t : t + 1], names_filter=lambda n: "mixer." in n, **inputs)
                assert len(kept) == sum("mixer." in name for name in hooked.hook_dict)
            else:
                step = hooked(tokens[:, t : t + 1], **inputs)
            steps.append(step)
        caches.append(cache_of(out))
        logits.append(torch.cat(steps, 1))
    assert torch.equal(*logits)
    for layer in hooked.cfg.recurrent_layers:
        assert torch.equal(*(cache.layers[layer].recurrent_states[0] for cache in caches))


@torch.no_grad()
def test_what_is_added_is_what_the_block_adds(hooked, tokens):
    """hook_resid_pre plus mixer, attention and MLP is hook_resid_post, the blocks' own multipliers included."""
    _, cache = hooked.run_with_cache(tokens)
    for layer, block in enumerate(hooked.attachment.layout.blocks):
        added = {"hook_attn_out": block.attn_out, "hook_mlp_out": block.mlp_out}
        if block.attn_out is not block.mixer_out:
            added["hook_mixer_out"] = block.mixer_out
        names = [name for name, module in added.items() if module is not None]
        assert all((f"blocks.{layer}.{name}" in hooked.hook_dict) == (name in names) for name in ("hook_mlp_out",))
        total = cache[f"blocks.{layer}.hook_resid_pre"] + sum(cache[f"blocks.{layer}.{name}"] for name in names)
        assert_close(total, cache[f"blocks.{layer}.hook_resid_post"], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_attention_heads_are_what_the_projection_takes(hooked, tokens):
    """hook_z of each block with attention, projected, is what its attention gives; an edit to it is felt."""
    found = {n: heads for n, block in enumerate(hooked.attachment.layout.blocks) if (heads := block.attn_heads)}
    hooks = {name for name in hooked.hook_dict if name.endswith("attn.hook_z")}
    assert {f"blocks.{n}.attn.hook_z" for n in found} == hooks
    assert bool(found) == any(
        type(module).__name__.endswith("Attention") and not rule_of(module) and hasattr(module, "o_proj")
        for block in hooked.attachment.layout.blocks
        for module in block.block.children()
    )
    for layer, heads in found.items():
        seen, name = [], f"blocks.{layer}.attn.hook_z"
        handle = heads.projection.register_forward_hook(lambda _m, _args, out, seen=seen: seen.append(out))
        logits, cache = hooked.run_with_cache(tokens, names_filter=name)
        handle.remove()
        assert cache[name].shape[2] == heads.n and torch.equal(heads.projection(cache[name].flatten(2)), seen[0])
        gone = hooked.run_with_hooks(tokens, fwd_hooks=[(name, lambda z, hook: torch.zeros_like(z))])
        assert not torch.allclose(gone, logits)


@torch.no_grad()
def test_rows_of_the_table_fire_with_their_shapes(hooked, tokens):
    layer = hooked.cfg.recurrent_layers[-1]
    shape, seen = hooked.cfg.layer(layer), {}
    sizes = {"B": 2, "H": shape.H, "K": shape.K, "V": shape.V, "F": shape.K * shape.V}
    has = hooked.attachment.mixers[layer].rule.factor_names
    rows = [row for row in HOOKS if row.scope in ("mixer", "head") and (row.factor is None or row.factor in has)]
    hooks = [
        (r.full_name(layer, 1), lambda x, hook: seen.setdefault(hook.name, []).append(tuple(x.shape))) for r in rows
    ]
    with hooked.hooks(hooks):
        hooked.generate(tokens, max_new_tokens=2, do_sample=False)
    for row in rows:
        found = seen[row.full_name(layer, 1)]
        axes = row.axes.replace("(KV)", "F")
        per_channel = "BTHK" if hooked.cfg.layer(layer).rule in ("Kimi delta attention", "RWKV-7") else "BTH"
        axes = per_channel if " or " in axes else axes
        assert found == [tuple({**sizes, "T": t, "S": s}[axis] for axis in axes) for t, s in ((70, 70), (1, 71))]


@pytest.mark.parametrize("hook", ["hook_mixer_out", "hook_attn_out", "hook_mlp_out"])
@torch.no_grad()
def test_scaled_outputs_can_be_edited(hook, tokens):
    """Falcon-H1's multipliers lie between the module and the residual stream; an edit is made behind them."""
    model = HookedRecurrent.from_hf(make_hf("falcon_h1"))
    names = [f"blocks.1.{name}" for name in ("hook_resid_post", hook)]
    _, plain = model.run_with_cache(tokens, names_filter=names)

    def in_place(x, hook):
        x.zero_()

    for edit in (lambda x, hook: torch.zeros_like(x), in_place):
        with model.hooks([(names[1], edit)]):
            _, edited = model.run_with_cache(tokens, names_filter=names[0])
        gone = plain[names[0]] - edited[names[0]]
        assert gone.abs().max() > 1e-3
        if hook == "hook_mlp_out":  # the others reach the MLP as well
            assert_close(gone, plain[names[1]], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_skip_is_outside_the_state(tokens):
    """Mamba-2 adds D x to its reads: reads are S^T C alone, and zeroing every value leaves D x in place."""
    model = HookedRecurrent.from_hf(make_hf("mamba2"))
    prefix, mixer = "blocks.1.mixer.", model.attachment.layout.blocks[1].mixer
    seen = []
    handle = mixer.norm.register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone()))
    _, cache = model.run_with_cache(tokens, names_filter=[prefix + "hook_v", prefix + "hook_read"])
    gone = [(prefix + "hook_v", lambda x, hook: torch.zeros_like(x))]
    model.run_with_hooks(tokens, fwd_hooks=gone)
    handle.remove()
    skip = (mixer.D[:, None] * cache[prefix + "hook_v"]).flatten(2)
    assert_close(seen[0], cache[prefix + "hook_read"].flatten(2) + skip)
    assert torch.equal(seen[1], skip)


def test_self_check_tells_of_upstreams_own_difference(tokens):
    """Nemotron-H clamps dt in prefill and not in decoding; hooks and edits hold in both."""
    with pytest.warns(UserWarning, match=r"layer [03] reads .* apart in decoding and in prefill"):
        model = HookedRecurrent.from_hf(make_hf("nemotron_h", time_step_min=0.05))
    with torch.no_grad():
        out = model.hf_model(tokens, use_cache=True)
        name = "blocks.0.mixer.hook_state"
        _, cache = model.run_with_cache(tokens, names_filter=name)
    assert_close(cache[name][:, -1], cache_of(out).layers[0].recurrent_states[0].mT, rtol=1e-4, atol=1e-5)


def test_starting_at_a_block_that_rereads_the_embeddings_needs_tokens(tokens):
    model = HookedRecurrent.from_hf(make_hf("zamba2"))
    with torch.no_grad(), pytest.raises(ValueError, match="reread the embeddings: start_at_layer needs tokens="):
        model(model(tokens, stop_at_layer=1), start_at_layer=1)


def test_starting_in_the_middle_before_any_pass(tokens):
    """Bamba's blocks return tuples, which a block that is skipped must do as well."""
    model = HookedRecurrent.from_hf(make_hf("bamba"), self_check=False)
    with torch.no_grad():
        residual = torch.randn(2, 70, 32, generator=torch.Generator().manual_seed(0))
        first = model(residual, start_at_layer=1)
        model(tokens)
        assert torch.equal(model(residual, start_at_layer=1), first)
