"""What heads hand on (hook_z), and how it reaches the residual stream and the logits, in models of every type."""

from __future__ import annotations

import pytest
import torch

from hookpoints import HookedRecurrent, UnsupportedModelError


def head_layers(model: HookedRecurrent) -> list[tuple[int, str]]:
    """(layer, part) of every mixer with heads."""
    attention = [(layer, "attn") for layer in model.cfg.attention]
    return sorted([(layer, "mixer") for layer in model.cfg.recurrent_layers] + attention)


@pytest.mark.usefixtures("_chained")
@torch.no_grad()
def test_heads_times_their_weights_are_what_the_layer_adds(hooked, tokens):
    """Recurrent layers and attention, multipliers and a norm behind the projection included; in float32."""
    _, cache = hooked.run_with_cache(tokens)
    for layer, part in head_layers(hooked):
        heads, weight = hooked.head_outputs(layer, part), hooked.layer_W_O(layer, part)
        z = cache[f"blocks.{layer}.{part}.hook_z"]
        assert z.shape == (2, 70, *weight.shape[:2]) and weight.shape[2] == hooked.cfg.d_model
        total = torch.einsum("bthv,hvd->btd", z, weight)
        if heads.projection.bias is not None:
            total += heads.projection.bias * heads.scale
        total = total if heads.norm is None else heads.norm(total) * heads.added.scale
        added = cache[f"blocks.{layer}.hook_{'mixer' if part == 'mixer' else 'attn'}_out"]
        assert (total - added).pow(2).mean().sqrt() <= 2e-6 * added.pow(2).mean().sqrt()


@pytest.mark.usefixtures("_chained")
@torch.no_grad()
def test_weights_of_all_layers_are_one_tensor_where_shapes_agree(hooked):
    if hooked.cfg.model_type == "mamba2":
        assert torch.equal(hooked.W_O[1, 0], hooked.layer_W_O(1)[0])
    elif hooked.cfg.model_type == "qwen3_5_text":
        assert not hasattr(hooked, "W_O")
        with pytest.raises(UnsupportedModelError, match="layer 3 "):
            hooked.layer_W_O(3, "mixer")
