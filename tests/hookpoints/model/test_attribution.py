"""Contributions of sources sum to a head's direct path; first-order attributions are derivatives; in every family."""

from __future__ import annotations

import pytest
import torch
from conftest import MAKERS, VOCAB, KeepFloat64, hooked_in_float64, make_hf
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

EXACT = {"rtol": 0, "atol": 1e-10}


@pytest.fixture(scope="module", params=sorted(MAKERS))
def _hooked64(request):
    """Without what layers add to their reads beside the state: the skip D x, the bonus of RWKV-7, biases of norms."""
    return hooked_in_float64(request.param, zeroed=(".D", ".r_k", "norm.bias"))


@pytest.fixture
def hooked64(_hooked64):
    with KeepFloat64():
        yield _hooked64


@pytest.fixture(scope="module")
def sequence():
    return torch.randint(1, VOCAB, (1, 24), generator=torch.Generator().manual_seed(3))


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


@torch.no_grad()
def test_sources_add_up_to_the_direct_path(hooked64, sequence):
    """Of every head at every token, for a token and for a difference of two."""
    for layer in hooked64.cfg.recurrent_layers[::2]:
        direct = {answer: direct_attribution(hooked64, sequence, layer, answer) for answer in (5, 9)}
        found = source_attribution(hooked64, sequence, layer, 5)
        assert_close(found.sum(-1), direct[5], **EXACT)
        assert found.abs().max() > 1e-4 and not found.triu(1).any()
        found = source_attribution(hooked64, sequence, layer, 5, against=9)
        assert_close(found.sum(-1), direct[5] - direct[9], **EXACT)


def test_attributions_are_derivatives(hooked64, sequence):
    """A write made a little smaller takes off its share of the metric."""

    def metric(logits):
        return logits[0, -1].log_softmax(-1)[5]

    table = write_attribution(hooked64, sequence, metric)
    layers = hooked64.cfg.recurrent_layers
    assert len(table) == sequence.shape[1] * sum(hooked64.cfg.layer(layer).H for layer in layers)
    for layer, head, position in ((layers[0], 1, 3), (layers[-1], 0, 20)):

        def smaller(u, hook, step, at=(head, position)):
            u[:, at[1], at[0]] *= 1 - step
            return u

        name, ends = f"blocks.{layer}.mixer.hook_write_value", []
        for step in (1e-4, -1e-4):
            with torch.no_grad():
                hook = [(name, lambda u, hook, step=step: smaller(u, hook, step))]
                ends.append(float(metric(hooked64.run_with_hooks(sequence, fwd_hooks=hook))))
        row = table[(table["layer"] == layer) & (table["head"] == head) & (table["position"] == position)]
        assert float(row["attribution"].iloc[0]) == pytest.approx((ends[1] - ends[0]) / 2e-4, rel=1e-3, abs=1e-7)


def test_attributions_are_held_against_exact_deletions(model, tokens):
    def metric(logits):
        return logits[0, -1, 5] - logits[0, -1, 9]

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


def test_what_cannot_be_attributed_says_so(model, tokens):
    def metric(logits):
        return logits[0, -1, 5]

    with pytest.raises(InputError, match="one sequence"):
        write_attribution(model, tokens, metric)
    with pytest.raises(ValueError, match="two"):
        check_attribution(model, tokens[:1], metric, write_attribution(model, tokens[:1], metric).head(1))
    with pytest.raises(UnsupportedModelError, match="no recurrence"):
        source_attribution(model, tokens, 3, 5)


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
