"""The model of RWKV-7 in plain torch: padding leaves no trace, and every parameter learns."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VOCAB, make_hf
from torch.testing import assert_close

from hookpoints import HookedRecurrent
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
    noise = tokens[1:, :20]
    for left in (20, 0, 7):
        row = torch.cat([noise[:, :left], tokens[:1, :50], noise[:, left:]], 1)
        mask = torch.zeros_like(row)
        mask[:, left : left + 50] = 1
        batch, masks = torch.cat([row, tokens[1:]]), torch.cat([mask, torch.ones_like(mask)])
        out = model64(batch, attention_mask=masks)
        assert_close(out.logits[0, left : left + 50], alone.logits[0], **EXACT)
        assert_close(out.logits[1], model64(tokens[1:]).logits[0], **EXACT)
        for padded, plain in zip(cache_of(out).layers, cache_of(alone).layers):
            assert_close(padded.recurrent_states[0][:1], plain.recurrent_states[0], **EXACT)
            assert_close(padded.conv_states[0][:1], plain.conv_states[0], **EXACT)
        cut = left + 20  # the second half from a cache, its padding included
        first = model64(batch[:, :cut], attention_mask=masks[:, :cut])
        rest = model64(batch[:, cut:], attention_mask=masks, cache=cache_of(first))
        assert_close(rest.logits[0, : left + 50 - cut], alone.logits[0, 20:], **EXACT)


@torch.no_grad()
def test_generation_in_batches_with_padding_and_beams(tokens):
    model = make_hf("rwkv7")
    prompt = torch.cat([torch.cat([torch.zeros_like(tokens[:1, :5]), tokens[:1, :15]], 1), tokens[1:, :20]])
    mask = torch.ones_like(prompt)
    mask[0, :5] = 0
    out = model.generate(prompt, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for row, alone in enumerate((tokens[:1, :15], tokens[1:, :20])):
        assert torch.equal(out[row, 20:], model.generate(alone, max_new_tokens=6, do_sample=False)[0, -6:])
    beams = model.generate(prompt, attention_mask=mask, max_new_tokens=6, num_beams=3, do_sample=False)
    slow = model.generate(prompt, attention_mask=mask, max_new_tokens=6, num_beams=3, do_sample=False, use_cache=False)
    assert torch.equal(beams, slow)


def test_every_parameter_learns(tokens):
    model = make_hf("rwkv7").train()
    out = model(tokens, labels=tokens)
    assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))
    assert set(out.keys()) == {"loss", "logits"}
    out.loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_decays_begin_slow_and_fast():
    """Per head and channel, with fla's and the paper's initial weights: w0 goes from -6 to 0 over all channels, and
    0.5 + 2.5 z |z| is added, where z goes from -1 to 1 inside of each head."""
    torch.manual_seed(0)
    model = HookedRecurrent.from_hf(RWKV7ForCausalLM(RWKV7Config(vocab_size=VOCAB, hidden_size=128, head_dim=32)))
    with torch.no_grad():
        decay = model.recurrence(torch.tensor([[1, 2, 3]]), 1).log_decay.exp().mean((0, 1))
    assert decay.max() > 0.999 and 0.545 < decay.min() < 0.6
    assert (decay.mean(-1).diff() < 0).all()  # the first heads are the slow ones
    w0 = model.hf_model.model.layers[1].attn.w_lora.lora[2].bias.detach()
    ends = [-6 - 2, -6 * 96 / 127 + 3, -6 * 31 / 127 - 2, 3]
    assert w0[[0, 31, 96, 127]].tolist() == pytest.approx(ends, abs=1e-5)
