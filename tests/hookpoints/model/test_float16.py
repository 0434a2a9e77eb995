"""float16 ends at 65504: what leaves it raises, or the model's own norms tame it and the result is right."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import MAKERS, make_hf

from hookpoints import HookedRecurrent, WriteEdit
from hookpoints.errors import Float16OverflowError
from hookpoints.model.selfcheck import relative_error

IDS = torch.arange(1, 11).view(2, 5)


@pytest.mark.parametrize("model_type", sorted(MAKERS))
@torch.no_grad()
def test_a_hook_raises_or_gives_what_float32_gives(model_type):
    half = HookedRecurrent.from_hf(make_hf(model_type).half())
    full = HookedRecurrent.from_hf(make_hf(model_type).half().float())
    layer = half.cfg.recurrent_layers[0]
    for hook, scale in itertools.product(("hook_v", "hook_write", "hook_state"), (100.0, 1e7)):
        hooks = [(f"blocks.{layer}.mixer.{hook}", lambda value, hook, scale=scale: scale * value)]
        expected = full.run_with_hooks(IDS, fwd_hooks=hooks)
        try:
            found = half.run_with_hooks(IDS, fwd_hooks=hooks)
        except Float16OverflowError as error:
            assert scale == 1e7 and "float16's range" in str(error) and "torch.bfloat16" in str(error)
        else:
            assert relative_error(expected, found) < 1e-2


@torch.no_grad()
def test_an_output_that_overflows_behind_its_reads_raises():
    """Mamba-2's op hands its reads on in float32; without a norm behind it, it is the layer's output that overflows."""
    model = HookedRecurrent.from_hf(make_hf("falcon_h1").half())
    plain = model(IDS)
    with pytest.raises(Float16OverflowError, match="the output of layer 0 leaves float16's range"):
        model.run_with_hooks(IDS, fwd_hooks=[("blocks.0.mixer.hook_write", lambda write, hook: 1e7 * write)])
    assert torch.equal(model(IDS), plain)


def test_weights_that_overflow_by_themselves_are_told_at_load():
    weights = make_hf("mamba2")
    with torch.no_grad():
        weights.backbone.layers[0].mixer.in_proj.weight.mul_(1e5)
    with pytest.raises(Float16OverflowError, match=r"by the model's own numbers .* dtype=torch\.bfloat16"):
        HookedRecurrent.from_hf(weights.half())


@pytest.mark.parametrize("model_type", ["qwen3_5", "mamba2"])
@torch.no_grad()
def test_float16_overflow_is_never_silent(model_type):
    """An edit is computed in float32; where its reads do not fit float16 it raises, in prefill, session, generation."""
    model = HookedRecurrent.from_hf(make_hf(model_type).half())
    layer = model.cfg.recurrent_layers[-1]
    shape, tokens = model.cfg.layer(layer), IDS[:1]

    def runs(scale):
        edit = WriteEdit(layer, 0, None, torch.full((shape.K,), scale), torch.ones(shape.V))
        yield lambda: model.run_with_edits(tokens, [edit]).logits
        yield lambda: model.generate(
            tokens, edits=edit, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        ).logits[-1]
        with model.edits(edit):
            yield lambda: model(tokens)

    assert all(torch.isfinite(run()).all() for run in runs(10.0))
    finite, raised = 0, 0
    for run in runs(1e7):
        try:
            finite += bool(torch.isfinite(run()).all())
        except Float16OverflowError as error:
            assert "float16's range" in str(error) and "torch.bfloat16" in str(error)
            raised += 1
    # Mamba-2's scan hands its reads on in float32, and the norm behind it tames them: there the result is right.
    assert (finite, raised) == ((0, 3) if model_type == "qwen3_5" else (2, 1))
