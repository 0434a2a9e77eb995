"""What is still held, by the terms of a state; sentences that are told, and those that an answer hangs on."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from remembering import drawn_ids
from tiny_models import KeepFloat64, hooked_in_float64
from torch.testing import assert_close

from hookpoints import HookedRecurrent
from hookpoints.errors import InputError, UnsupportedModelError
from hookpoints.memory.held import HELD, SURE, held_share, sentence_spans, term_sizes
from hookpoints.zoo import english


@pytest.mark.parametrize("name", ["qwen3_5", "rwkv7", "mamba2"])
def test_a_terms_size_is_what_a_token_leaves_in_the_state(name):
    """The state with the token's write, minus the state without it."""
    with KeepFloat64():
        model = hooked_in_float64(name)
        memory = model.memory(drawn_ids(1, 11))
        layer = model.cfg.recurrent_layers[0]
        r = memory.recurrence(layer)
        sizes = term_sizes(*memory.terms(layer))
        for t in (2, 10):
            u = r.u.clone()
            u[:, t] = 0
            left = r.final_state() - r.replace(u=u).final_state()
            assert_close(sizes[:, t].double(), left.flatten(2).norm(dim=-1).double(), rtol=1e-6, atol=1e-9)


def test_terms_of_several_writes_add_up():
    keys, values = torch.randn(2, 3, 4, 2, 5), torch.randn(2, 3, 4, 2, 6)
    dense = torch.einsum("bthrk,bthrv->bthkv", keys, values)
    assert_close(term_sizes(keys, values), dense.flatten(3).norm(dim=-1))


@pytest.fixture(scope="module")
def speaker() -> HookedRecurrent:
    return HookedRecurrent.from_pretrained("facts-english")


@pytest.fixture(scope="module")
def documents() -> list[english.Document]:
    return english.draw(6, facts=4, questions=1, seed=3)


def test_the_head_that_keeps_longest_holds_the_facts(speaker, documents):
    """The token after a value, in a model that no test of ours has looked at before."""
    memories = [speaker.memory(torch.tensor([document.tokens[:250]])) for document in documents]
    best = memories[0].keeping()[0]
    told = [{fact.place + 1 for fact in document.facts if fact.stop < 240} for document in documents]
    found = [
        {held.position for held in memory.held(len(places) + 1, layer=best.layer, head=best.head)}
        for memory, places in zip(memories, told)
    ]
    hits = sum(len(own & places) for own, places in zip(found, told))
    others = sum(len(own & places) for own, places in zip(found, told[1:] + told[:1]))
    assert hits >= 0.9 * sum(map(len, told)) and others <= 0.2 * hits


def question(fact: english.ToldFact) -> str:
    return " " + english.RELATIONS[fact.relation].asked[0].split("? ")[0].format(n=fact.name) + "?"


def answer(memory, fact: english.ToldFact) -> str:
    return memory.model.to_string(int(memory.model.logits_after(memory, question(fact))[0, -1].argmax())).strip()


def test_a_sentence_is_told_instead_of_another(speaker, documents):
    for document in documents[:3]:
        fact, *others = document.facts
        memory = speaker.memory(torch.tensor([document.tokens[: max(each.stop for each in document.facts) + 4]]))
        old = " " + fact.sentence
        said = {each.value for each in document.facts}
        new = next(value for value in english.RELATIONS[fact.relation].values if value not in said)
        told = memory.told(old.replace(fact.value, new), instead_of=old)
        assert [answer(memory, fact), answer(told, fact)] == [fact.value, new]
        assert answer(memory.told(None, instead_of=old), fact) != fact.value
        assert [answer(told, each) for each in others] == [answer(memory, each) for each in others]
        removed = memory.told(None, instead_of=old)
        added, subtracted, untold = map(speaker.memory, (old.replace(fact.value, new), old, torch.tensor([[0]])))
        for layer, whole in (subtracted - untold).items():
            left = told.state(layer) - (added - untold)[layer]
            shares = (memory.state(layer) - left).flatten(2).norm(dim=2) / whole.flatten(2).norm(dim=2)
            assert_close(memory.state(layer) - left, shares[..., None, None] * whole, rtol=0, atol=1e-4)
            # All that a head holds of it, from nothing to the whole.
            inner = (left * whole).sum((2, 3)) / whole.square().sum((2, 3))
            held_none = (shares < 1e-3) & (inner < 0)
            held_more = (shares > 0.999) & (inner > 0)
            assert bool((held_none | held_more | (inner.abs() < 1e-3)).all())
            assert_close(removed.state(layer), memory.state(layer) - whole, rtol=0, atol=1e-4)


def test_the_sentence_that_overwrote_an_answer_is_found(speaker, documents):
    """In most texts: the model has to know the first answer without it."""
    found = 0
    for document in documents[:4]:
        fact = document.facts[0]
        clean = speaker.memory(torch.tensor([document.tokens[: document.facts[-1].stop]]))
        said = {each.value for each in document.facts}
        new = next(value for value in english.RELATIONS[fact.relation].values if value not in said)
        injected = " " + fact.sentence.replace(fact.value, new)
        memory = speaker.memory(injected + " The past year was one of peace.", memory=clean)
        first = memory.suspects(question(fact))[0]
        assert answer(memory, fact) == new and first.text.endswith(injected.strip())
        assert first.answer.strip() == answer(memory.without(first.span), fact)
        found += first.flagged and first.answer.strip() == fact.value
        for said, read in ((new, memory), (fact.value, clean)):
            for suspect in read.suspects(question(fact)):
                assert math.isnan(suspect.held) == (suspect.answer.strip() == said or said not in suspect.text)
                assert suspect.flagged == (suspect.probability >= SURE and suspect.held >= HELD)
    assert found >= 3


@pytest.mark.parametrize("name, most", [("facts-english", 6), ("facts-english-mamba2", 6), ("embedded", 42)])
def test_sentences_are_cut_together_as_each_is_alone(name, most, documents):
    """Where a layer attends, one after the other: a pass to cut, and a pass to ask."""
    model = HookedRecurrent.from_pretrained(name)
    told = [fact for document in documents for fact in document.facts][:20]
    memory = model.memory(" ".join(fact.sentence for fact in told))
    passes = []
    with model.hf_model.register_forward_pre_hook(lambda *_: passes.append(1)):
        found = memory.suspects(question(told[1]))
    assert len(found) == 20 and len(passes) <= most
    whole = model.logits_after(memory, question(told[1]))[0, -1].log_softmax(-1)
    for suspect in found:
        cut = memory.without(suspect.span)
        without = model.logits_after(cut, question(told[1]))[0, -1].log_softmax(-1)
        assert suspect.answer == model.to_string(int(without.argmax()))
        assert suspect.probability == pytest.approx(float(without.max().exp()), abs=1e-4)
        assert suspect.kl == pytest.approx(float((without.exp() * (without - whole)).sum()), abs=1e-4)


def test_what_states_hold_of_a_change_is_its_share_over_all_layers():
    change = {layer: torch.randn(1, 3, 4, 5, dtype=torch.float64) for layer in (0, 2)}
    other = {0: change[0].roll(1, 3), 2: change[2].roll(1, 3)}
    other = {layer: x - held_share(other, change) * change[layer] for layer, x in other.items()}
    states = {layer: 0.3 * x + other[layer] for layer, x in change.items()}
    assert held_share(other, change) == pytest.approx(0, abs=1e-12)
    assert held_share(states, change) == pytest.approx(0.3)


def test_spans_of_sentences_cover_all_tokens():
    spans = sentence_spans(["Ben", " lives", " in Rome", ".", " Ada", " keeps it", "!", " The", " year"])
    assert spans == [(0, 4), (4, 7), (7, 9)]
    assert sentence_spans([" The", " year", "."]) == [(0, 3)]


@pytest.mark.parametrize("head", [-1, 99, True, "0"])
def test_a_head_is_counted_from_zero(speaker, head):
    memory = speaker.memory("Ben lives in Rome.")
    for ask in (memory.state, memory.terms, memory.holdings, partial(memory.held, 3)):
        with pytest.raises(InputError, match=r"^head: expected 0 to"):
            ask(layer=0, head=head)
    for layer in (-1, 99, True, "0"):
        with pytest.raises(UnsupportedModelError, match="out of range"):
            memory.state(layer)


@pytest.mark.parametrize(
    "ask, match",
    [
        (lambda memory: memory.held(0), "n: expected"),
        (lambda memory: memory.held(3, layer=0, head=9), "head: expected 0 to"),
        *((lambda memory, new=new: memory.told(new), "text or token ids") for new in (5, [[5]], ["word"], [2.5])),
        (lambda memory: memory.held(3, row=1), "row: expected"),
        (lambda memory: memory.keeping(99), "after: expected 1 to"),
        (lambda memory: memory.told(None), "new: expected a sentence"),
        (lambda memory: memory.told("", instead_of="Ben lives in Rome."), "expected a sentence"),
        (lambda memory: memory.suspects("Where does Ben live?"), "two sentences at least"),
        (lambda memory: memory.suspects(""), "at least one"),
    ],
)
def test_bad_input_is_refused(speaker, ask, match):
    with pytest.raises(InputError, match=match):
        ask(speaker.memory("Ben lives in Rome."))
