"""The model of RWKV-7 in plain torch: padding leaves no trace, and every parameter learns."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VOCAB, make_hf
from torch.testing import assert_close

from hookpoints.model.inputs import cache_of
from hookpoints.rwkv7 import RWKV7Config, RWKV7ForCausalLM

EXACT = {"rtol": 0, "atol": 1e-10}


@pytest.fixture(scope="module")
def model64():
    return make_hf("rwkv7").double()


@torch.no_grad()
def test_padding_leaves_no_trace(model64, tokens):
    """A padded row gives what the sequence gives alone, on whichever side, and from a cache."""
    alone = model64(tokens[:1, :50])
    for left in (20, 0, 7):
        row = torch.cat([tokens[1:, :left], tokens[:1, :50], tokens[1:, left:20]], 1)
        mask = torch.zeros_like(row)
        mask[:, left : left + 50] = 1
        batch, masks = torch.cat([row, tokens[1:]]), torch.cat([mask, torch.ones_like(mask)])
        out = model64(batch, attention_mask=masks)
        assert_close(out.logits[0, left : left + 50], alone.logits[0], **EXACT)
        assert_close(out.logits[1], model64(tokens[1:]).logits[0], **EXACT)
        cut = left + 20  # the second half from a cache, its padding included
        first = model64(batch[:, :cut], attention_mask=masks[:, :cut])
        rest = model64(batch[:, cut:], attention_mask=masks, cache=cache_of(first))
        assert_close(rest.logits[0, : left + 50 - cut], alone.logits[0, 20:], **EXACT)


@torch.no_grad()
def test_generation_in_batches_with_padding_and_beams(tokens):
    model, how = make_hf("rwkv7"), {"max_new_tokens": 6, "do_sample": False}
    prompt, mask = tokens[:, :20].clone(), torch.ones_like(tokens[:, :20])
    prompt[0, :5] = mask[0, :5] = 0
    out = model.generate(prompt, attention_mask=mask, **how)
    for row, alone in zip(out, (prompt[:1, 5:], prompt[1:])):
        assert torch.equal(row[20:], model.generate(alone, **how)[0, -6:])
    beams = model.generate(prompt, attention_mask=mask, num_beams=3, **how)
    assert torch.equal(beams, model.generate(prompt, attention_mask=mask, num_beams=3, use_cache=False, **how))


def test_every_parameter_learns(tokens):
    model = make_hf("rwkv7").train()
    out = model(tokens, labels=tokens)
    assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))
    assert set(out.keys()) == {"loss", "logits"}
    out.loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_decays_begin_slow_and_fast():
    """With fla's and the paper's initial weights: w0 goes from -6 to 0 over all channels, and 0.5 + 2.5 z |z| is added,
    where z goes from -1 to 1 inside of each head."""
    hf = RWKV7ForCausalLM(RWKV7Config(vocab_size=VOCAB, hidden_size=128, head_dim=32))
    w0 = hf.model.layers[1].attn.w_lora.lora[2].bias.detach()
    ends = [-6 - 2, -6 * 96 / 127 + 3, -6 * 31 / 127 - 2, 3]
    assert w0[[0, 31, 96, 127]].tolist() == pytest.approx(ends, abs=1e-5)
