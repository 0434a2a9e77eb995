"""Contributions of sources sum to a head's direct path; first-order attributions are derivatives; in every family."""

from __future__ import annotations

import pytest
import torch
from conftest import MAKERS, MAMBA1, VOCAB, KeepFloat64, hooked_in_float64, make_hf
from torch.testing import assert_close

from hookpoints import (
    HookedRecurrent,
    UnsupportedModelError,
    WriteEdit,
    check_attribution,
    source_attribution,
    write_attribution,
)
from hookpoints.errors import InputError

SEQUENCE = torch.randint(1, VOCAB, (1, 24), generator=torch.Generator().manual_seed(3))


def metric(logits: torch.Tensor) -> torch.Tensor:
    return logits[0, -1, 5] - logits[0, -1].log_softmax(-1)[9]


def direct_attribution(model: HookedRecurrent, tokens: torch.Tensor, layer: int, answer: int) -> torch.Tensor:
    """[B,H,T], from what the heads hand to the output projection: W_O, the final norm at its scale, W_U."""
    names = [f"blocks.{layer}.mixer.hook_z", f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"]
    logits, cache = model.run_with_cache(tokens, names_filter=[*names, "ln_final.hook_normalized"])
    z, residual, normed = cache.values()
    added = torch.einsum("bthv,hvd->bthd", z, model.layer_W_O(layer))
    if isinstance(model.attachment.layout.final_norm, torch.nn.LayerNorm):
        residual = residual - residual.mean(-1, keepdim=True)
        added = added - added.mean(-1, keepdim=True)
    multiplier = (logits / (normed @ model.W_U))[0, 0, answer]
    return torch.einsum("bthd,btd,d->bht", added, normed / residual, model.W_U[:, answer]) * multiplier


@pytest.mark.parametrize("model_type", sorted(MAKERS.keys() - {*MAMBA1, "glm5_next", "qwen4_exp"}))
@torch.no_grad()
def test_sources_add_up_to_the_direct_path(model_type):
    """Of every head at every token, for a difference of two tokens. Without what layers add to their reads beside the
    state: the skip D x, the bonus of RWKV-7, biases of norms."""
    hooked = hooked_in_float64(model_type, zeroed=(".D", ".r_k", "norm.bias"), self_check=False)
    with KeepFloat64():
        layer = hooked.cfg.recurrent_layers[-1]
        direct, other = (direct_attribution(hooked, SEQUENCE, layer, answer) for answer in (5, 9))
        found = source_attribution(hooked, SEQUENCE, layer, 5, against=9)
        assert_close(found.sum(-1), direct - other, rtol=0, atol=1e-10)
        assert found.abs().max() > 1e-4 and not found.triu(1).any()


def test_attributions_are_derivatives(hooked64):
    """A write made a little smaller takes off its share of the metric."""

    table, layers = write_attribution(hooked64, SEQUENCE, metric), hooked64.cfg.recurrent_layers
    assert len(table) == SEQUENCE.shape[1] * sum(hooked64.cfg.layer(layer).H for layer in layers)
    for layer, head, position in ((layers[0], hooked64.cfg.layer(layers[0]).H // 2, 3), (layers[-1], 0, 20)):

        def shrunk(step, layer=layer, head=head, position=position):
            def hook(u, hook):
                u[:, position, head] *= 1 - step

            name = f"blocks.{layer}.mixer.hook_write_value"
            with torch.no_grad():
                return float(metric(hooked64.run_with_hooks(SEQUENCE, fwd_hooks=[(name, hook)])))

        (found,) = table.query("layer == @layer and head == @head and position == @position")["attribution"]
        assert found == pytest.approx((shrunk(-1e-4) - shrunk(1e-4)) / 2e-4, rel=1e-3, abs=1e-7)


def test_attributions_are_compared_with_exact_deletions(model, tokens):
    tokens = tokens[:1, :30]
    table = write_attribution(model, tokens, metric)
    check = check_attribution(model, tokens, metric, table.sample(70, random_state=0))
    assert list(check.table.columns) == ["layer", "head", "position", "attribution", "measured"]
    assert check.correlation > 0.8 and 0.5 < check.slope < 2
    with torch.no_grad():
        plain = metric(model(tokens))
        for layer, head, position, _, measured in check.table.head(2).to_numpy():
            with model.edits(WriteEdit(int(layer), int(head), int(position), mode="delete")):
                assert float(plain - metric(model(tokens))) == pytest.approx(measured, abs=1e-4)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda model, tokens: write_attribution(model, tokens, metric), InputError, "one sequence"),
        (lambda model, tokens: source_attribution(model, tokens, 3, 5), UnsupportedModelError, "no recurrence"),
        (
            lambda model, tokens: check_attribution(
                model, tokens[:1], metric, write_attribution(model, tokens[:1], metric).head(1)
            ),
            ValueError,
            "two",
        ),
    ],
)
def test_what_cannot_be_attributed_is_refused(model, tokens, ask, error, message):
    with pytest.raises(error, match=message):
        ask(model, tokens)


def test_a_layer_that_bends_its_reads_is_refused(tokens):
    """No part of its output would belong to a source."""
    hf = make_hf()
    norm = hf.model.layers[1].linear_attn.norm

    class Bent(torch.nn.Module):
        def forward(self, reads, gate):
            return norm(reads, gate).tanh()

    hf.model.layers[1].linear_attn.norm = Bent()
    model = HookedRecurrent.from_hf(hf)
    with pytest.raises(UnsupportedModelError, match="layer 1"):
        source_attribution(model, tokens, 1, 5)
    assert source_attribution(model, tokens, 0, 5).shape == (2, 4, 70, 70)
