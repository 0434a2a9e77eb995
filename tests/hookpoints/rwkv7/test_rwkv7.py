"""RWKV-7 in plain torch: another implementation agrees, padding leaves no trace."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import VOCAB, make_hf
from recurrences import drawn as normal
from rwkv7_oracles import Answer, ask_official
from torch.testing import assert_close

from hookpoints import HookedRecurrent, Recurrence
from hookpoints.model.inputs import cache_of
from hookpoints.rules.rwkv7 import FLA_RWKV7, RWKV7
from hookpoints.rwkv7 import RWKV7Config, RWKV7ForCausalLM, rwkv7_recurrence

B, T, H, K, V = 2, 45, 3, 8, 6
EXACT = {"rtol": 0, "atol": 1e-10}


def call(length: int = T) -> dict:
    """Arguments as the layer makes them: the erase key is normalised, and is not the key that is written."""
    erase = torch.nn.functional.normalize(normal(1, B, length, H, K), dim=-1)
    rate = normal(2, B, length, H, K).sigmoid()
    return {
        "r": normal(3, B, length, H, K),
        "w": -0.6 * normal(4, B, length, H, K).sigmoid(),
        "k": normal(5, B, length, H, K),
        "v": normal(6, B, length, H, V),
        "a": -erase,
        "b": erase * rate,
        "initial_state": normal(7, B, H, K, V),
        "output_final_state": True,
    }


def by_hand(r, w, k, v, a, b, initial_state, **_):
    """The paper's equation, one token and one K x K matrix after the other."""
    state, outputs = initial_state, []
    for t in range(r.shape[1]):
        step = torch.diag_embed(w[:, t].exp()) + b[:, t, ..., None] * a[:, t, ..., None, :]
        state = step @ state + k[:, t, ..., None] * v[:, t, ..., None, :]
        outputs.append((state * r[:, t, ..., None]).sum(-2))
    return torch.stack(outputs, 1), state


# ---- the operation and its rule


@pytest.mark.parametrize("length", [1, 3, 45, 64])
def test_the_operation_is_the_papers_equation(length):
    assert_close(rwkv7_recurrence(**call(length)), by_hand(**call(length)), **EXACT)


@pytest.mark.parametrize("rule", [RWKV7, FLA_RWKV7])
@pytest.mark.parametrize("fused", [False, True])
def test_the_rule_is_the_operation(rule, fused):
    """Both forms of call: a and b, or fla's decoding op with the erase key and the rate apart."""
    own = {**call(), "scale": 1.0}
    arguments = dict(own)
    if fused:
        erase = -own["a"]
        arguments |= {"kk": erase, "a": own["b"] / erase}
        del arguments["b"]
    r = Recurrence.of(rule.form(rule.factors(arguments), arguments))
    assert_close(r.scan(method="reference"), by_hand(**own), **EXACT)
    assert rule.wants_state(arguments) and (r.H, r.K, r.V) == (H, K, V)


@pytest.mark.parametrize("field", RWKV7.factor_names)
def test_each_factor_can_be_fed_by_itself(field):
    rule, arguments = RWKV7, {**call(), "scale": 1.0}
    factors = rule.factors(arguments)
    factors = dataclasses.replace(factors, **{field: 0.7 * getattr(factors, field)})
    fed = rule.arguments(arguments, factors, frozenset({field}))
    assert_close(rwkv7_recurrence(**fed), by_hand(**fed), **EXACT)
    assert_close(Recurrence.of(rule.form(factors, arguments)).outputs(), by_hand(**fed)[0], **EXACT)
    assert not torch.equal(by_hand(**fed)[0], by_hand(**arguments)[0])


# ---- the model


@pytest.fixture(scope="module")
def wide():
    """Heads of 64, the only size that the official package knows; K = V, as its states are square."""
    return make_hf("rwkv7", hidden_size=128, head_dim=64, value_dim=128)


@pytest.fixture(scope="module")
def model64():
    return make_hf("rwkv7").double()


def assert_agrees(answer: Answer, model: RWKV7ForCausalLM, tokens: torch.Tensor) -> None:
    out = model(tokens)
    scale = float(out.logits.abs().max())
    assert_close(out.logits[0], answer.logits, rtol=0, atol=1e-5 * max(1.0, scale))
    for layer, state in zip(cache_of(out).layers, answer.states, strict=True):
        assert_close(layer.recurrent_states[0][0], state, rtol=1e-4, atol=1e-5 * float(state.abs().max()))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:FutureWarning")  # the package's own, from torch 2.15 on
@torch.no_grad()
def test_logits_and_states_are_those_of_the_official_package(wide, tokens, tmp_path, monkeypatch):
    assert_agrees(ask_official(wide, tokens[0].tolist(), tmp_path, monkeypatch), wide, tokens[:1])


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
    """Per head and channel, with fla's and the paper's initial weights."""
    torch.manual_seed(0)
    model = HookedRecurrent.from_hf(RWKV7ForCausalLM(RWKV7Config(vocab_size=VOCAB, hidden_size=128, head_dim=32)))
    with torch.no_grad():
        decay = model.recurrence(torch.tensor([[1, 2, 3]]), 1).log_decay.exp().mean((0, 1))
    assert decay.max() > 0.999 and 0.545 < decay.min() < 0.6
    assert (decay.mean(-1).diff() < 0).all()  # the first heads are the slow ones


# ---- hooks and edits that are its own
