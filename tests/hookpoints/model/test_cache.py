"""TransformerLens' cache methods on models of every type: parts add up to the stream, behind norms to the logits."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from torch.testing import assert_close
from transformer_lens import patching
from transformer_lens.utilities import get_act_name

from hookpoints.model.norm import Norm


@pytest.fixture
def run(hooked, tokens):
    with torch.no_grad():
        return hooked.run_with_cache(tokens)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert_close(actual, expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.usefixtures("_chained")
@torch.no_grad()
def test_parts_add_up_to_the_stream(hooked, run):
    _, cache = run
    for layer in range(1, hooked.cfg.n_layers + 1):
        entering = cache["resid_post", layer - 1]
        for parts, labels in (
            cache.decompose_resid(layer, return_labels=True),
            cache.stack_head_results(layer, return_labels=True, incl_remainder=True),
            cache.get_full_resid_decomposition(layer, return_labels=True),
        ):
            assert len(parts) == len(labels) == len(set(labels))
            close(parts.sum(0), entering)
        heads, labels = cache.stack_head_results(layer, return_labels=True)
        assert labels == hooked.all_head_labels()[: len(heads)]
        if not hooked.b_O.any():
            bias = cache.get_full_resid_decomposition(layer)[-1]
            assert bias.abs().max() <= 1e-5 * entering.abs().max()


@pytest.mark.usefixtures("_chained")
@torch.no_grad()
def test_parts_behind_the_final_norm_add_up_to_the_logits(hooked, run):
    logits, cache = run
    norm = Norm.of(hooked.attachment.layout.final_norm)
    expected = logits[..., 7] - norm.bias @ hooked.W_U[:, 7] - hooked.b_U[7]
    for stack in (cache.decompose_resid(), cache.get_full_resid_decomposition()):
        close(cache.logit_attrs(stack, 7).sum(0), expected)
    close(cache.decompose_resid(apply_ln=True).sum(0) @ hooked.W_U[:, 7], expected)
    close(norm.frozen(cache["resid_post", -1], cache["scale"]) + norm.bias, cache["normalized"])
    streams, labels = cache.accumulated_resid(apply_ln=True, return_labels=True)
    assert labels[-1] == "final_post" and len(streams) == hooked.cfg.n_layers + 1
    close(hooked.unembed(streams[-1]), logits)
    assert hooked.cfg.normalization_type == ("LN" if norm.centered else "RMS") and hooked.cfg.eps == norm.eps


@pytest.mark.usefixtures("_chained")
@torch.no_grad()
def test_parts_behind_a_blocks_norm_are_what_its_mixer_is_given(hooked, tokens, run):
    _, cache = run
    for layer, block in enumerate(hooked.attachment.layout.blocks):
        for mlp in (False, True):
            module, seen = block.norm(mlp=mlp), []
            if module is None or (mlp and not block.mlps):
                continue
            handle = module.register_forward_hook(lambda _m, _args, out, seen=seen: seen.append(out))
            hooked(tokens)
            handle.remove()
            parts = cache.decompose_resid(layer, mlp_input=mlp, apply_ln=True)
            given = seen[0][0] if isinstance(seen[0], tuple) else seen[0]  # of fla, with the stream
            close(parts.sum(0) + Norm.of(module).bias, given)


@torch.no_grad()
def test_positions_and_batches_are_sliced(model, tokens):
    logits, cache = model.run_with_cache(tokens)
    last = cache.decompose_resid(pos_slice=-1)
    close(cache.logit_attrs(last, tokens[:, 0], pos_slice=-1).sum(0), logits[:, -1].gather(1, tokens[:, :1])[:, 0])
    one = cache.apply_slice_to_batch_dim(slice(1, 2)).remove_batch_dim()
    assert_close(one.stack_head_results(pos_slice=5), cache.stack_head_results()[:, 1, 5])
    behind_norm = cache.decompose_resid(apply_ln=True)
    assert_close(one.decompose_resid(apply_ln=True), behind_norm[:, 1])
    assert_close(cache.apply_ln_to_stack(cache.decompose_resid(), batch_slice=1), behind_norm[:, 1])


@torch.no_grad()
def test_short_names_find_the_mixers_hooks(model, tokens):
    names = ["blocks.2.mixer.heads.1.hook_write_vec", "blocks.2.mixer.hook_read", "blocks.3.attn.hook_z"]
    _, cache = model.run_with_cache(tokens, names_filter=[get_act_name("heads.1.write_vec", 2), *names[1:]])
    assert list(cache) == names
    for key, name in zip((("heads.1.write_vec", 2), ("read", -2), ("z", 3)), names):
        assert cache[key] is cache[name]
    for key, message in ((("read", 0), r"blocks\.0\.mixer.hook_read was not kept"), (("nothing", 0), "is no hook")):
        with pytest.raises(KeyError, match=message):
            cache[key]


@torch.no_grad()
def test_activations_are_patched_by_their_short_names(model, tokens):
    """TransformerLens' generic_activation_patch, against the hook by its own name. Of a hybrid it asks for an index of
    the layers that have the hook."""
    clean, corrupted = tokens[:1, :12], tokens[1:, :12]
    _, cache = model.run_with_cache(clean, names_filter=lambda name: True)

    def patched(short: str, **sites):
        setter = patching.layer_pos_patch_setter
        return patching.generic_activation_patch(
            model, corrupted, cache, lambda logits: logits[0, -1, 5], setter, short, **sites
        )

    for short, full in (("z", "blocks.2.mixer.hook_z"), ("heads.1.write_vec", "blocks.2.mixer.heads.1.hook_write_vec")):

        def patch(value, hook, full=full):
            value[:, 4] = cache[full][:, 4]

        logits = model.run_with_hooks(corrupted, fwd_hooks=[(full, patch)])
        assert_close(patched(short, index_df=pd.DataFrame({"layer": [2], "pos": [4]}))[0], logits[0, -1, 5])
    with pytest.raises(KeyError, match="index_df"):
        patched("write", index_axis_names=["layer", "pos"])
