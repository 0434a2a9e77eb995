"""What is still held, by the terms of a state; sentences that are told, and those that an answer hangs on."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from remembering import drawn_ids
from tiny_models import KeepFloat64, hooked_in_float64
from torch.testing import assert_close

from hookpoints import HookedRecurrent
from hookpoints.errors import InputError, UnsupportedModelError
from hookpoints.memory.questions import (
    SURE,
    Suspect,
    kept_shares,
    largest_terms,
    sentence_spans,
    sentences_alike,
    term_sizes,
    words_of,
)
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


def test_a_share_is_that_of_the_terms_of_its_head():
    sizes = {0: torch.tensor([[3.0, 1], [1, 1]])}
    assert largest_terms(sizes, 2, None) == [(0.75, 0, 0, 0), (0.5, 1, 0, 1)]


def test_what_is_kept_is_the_median_of_writes_so_many_tokens_ago_and_up_to_a_quarter_more():
    left = torch.arange(20.0)[None, :, None]
    assert kept_shares(left, torch.full_like(left, 2), 8) == [5]  # of the writes at tokens 9, 10 and 11


@pytest.mark.parametrize(
    "probability, contradicts, flagged, overwrote",
    [
        (SURE, (0, 4), True, True),
        (SURE, (9, 12), True, False),
        (SURE - 0.01, (0, 4), False, False),
        (1.0, None, False, False),
    ],
)
def test_a_flag_needs_a_sure_answer_and_overwrote_an_earlier_sentence(probability, contradicts, flagged, overwrote):
    suspect = Suspect((5, 9), "", "", probability, 1.0, contradicts, [(5, 9)])
    assert (suspect.flagged, suspect.overwrote) == (flagged, overwrote)


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


def another_value(fact: english.ToldFact, document: english.Document) -> str:
    """The first that the document tells of nobody."""
    told = {each.value for each in document.facts}
    return next(value for value in english.RELATIONS[fact.relation].values if value not in told)


def answer(memory, fact: english.ToldFact) -> str:
    return memory.model.to_string(int(memory.model.logits_after(memory, question(fact))[0, -1].argmax())).strip()


def test_a_sentence_is_told_in_the_place_of_another(speaker, documents):
    """The memory is that of the text with the new sentence, and answers all that a memory can be asked."""
    for document in documents[:2]:
        fact = document.facts[1]
        tokens = document.tokens[: document.facts[-1].stop + 4]
        memory = speaker.memory(torch.tensor([tokens]))
        old = fact.sentence
        new = old.replace(fact.value, another_value(fact, document))
        told = memory.told(new, instead_of=old)
        spelled = speaker.to_tokens(f" {new}", prepend_bos=False)[0].tolist()
        assert told.tokens[0].tolist() == [*tokens[: fact.start], *spelled, *tokens[fact.stop :]]
        fresh = speaker.memory(told.tokens)
        assert_close(
            told - fresh, {layer: torch.zeros_like(told.state(layer)) for layer in told.forms}, rtol=0, atol=1e-4
        )
        assert [answer(memory, fact), answer(told, fact)] == [fact.value, another_value(fact, document)]
        assert told.approximate is None and told.held(1) and told.keeping() and told.suspects(question(fact))
        assert answer(told.without((fact.start, fact.start + len(spelled))), fact) != another_value(fact, document)
        assert torch.equal(
            memory.told(new, instead_of=slice(fact.start, fact.stop)).tokens[:, 1:].bool(), told.tokens[:, 1:].bool()
        )


def test_a_sentence_is_replaced_at_every_place_where_it_was_read(speaker):
    """Also the one that begins the text, whose first word is another token."""
    text = "{0} The past year was one of peace. {0} We have paid our debts. {0}"
    model = HookedRecurrent.from_pretrained("embedded")
    told = model.memory(text.format("The war is over.")).told("Our army is home.", instead_of=" The war is over.")
    assert torch.equal(told.tokens, model.to_tokens(text.format("Our army is home.")))
    memory = speaker.memory(text.format("Ben lives in Rome."))
    ids = speaker.to_tokens(" Ben lives in Rome.", prepend_bos=False)[0].tolist()
    assert int((memory.told([3], instead_of=ids).tokens == 3).sum()) == 3  # ids are taken as they are
    assert torch.equal(memory.told(" So be it.").tokens, speaker.memory(" So be it.", memory=memory).tokens)


def test_two_places_that_overlap_are_one(speaker):
    memory = speaker.memory(torch.tensor([[7, 5, 5, 5, 9]]))
    assert memory.told([3, 4], instead_of=[5, 5]).tokens.tolist() == [[7, 5, 3, 4, 9]]
    rows = speaker.memory(torch.tensor([[7, 5, 9, 5], [7, 8, 9, 5]]))  # the places that all rows share
    assert rows.told([3], instead_of=[5]).tokens.tolist() == [[7, 5, 9, 3], [7, 8, 9, 3]]


@pytest.mark.parametrize("is_later", [True, False])
@pytest.mark.parametrize("name", ["facts-english", "facts-english-rwkv7"])
def test_only_a_later_sentence_overwrote_another(name, is_later):
    """In both orders, whichever of two sentences the answer hangs on is flagged."""
    model = HookedRecurrent.from_pretrained(name)
    told = ["Clara lives in Paris.", "The home of Clara is Vienna."]
    first, second = told if is_later else told[::-1]
    memory = model.memory(
        f"The crops were good. {first} Our commerce has been extended to new markets. {second} We are at peace."
    )
    suspects = memory.suspects(" Where does Clara live?")
    said = model.to_string(int(model.logits_after(memory, " Where does Clara live?")[0, -1].argmax())).strip()
    flagged, rival = suspects[0], next(each for each in suspects if each.span == suspects[0].contradicts)
    assert said in flagged.text and {flagged.text.strip(), rival.text.strip()} == {*told}
    assert flagged.answer.strip() in rival.text and flagged.flagged
    assert flagged.overwrote == (rival.span < flagged.span)
    assert not any(each.flagged for each in suspects[1:])


def test_sentences_of_the_same_answer_are_left_out_together(speaker, documents):
    """A lie that is told twice hides behind itself."""
    flagged = 0
    for document in documents[:4]:
        fact = document.facts[0]
        clean = speaker.memory(torch.tensor([document.tokens[: document.facts[-1].stop]]))
        lies = [
            f" {wording.format(n=fact.name, v=another_value(fact, document))}"
            for wording in english.RELATIONS[fact.relation].told[:2]
        ]
        memory = speaker.memory(f"{lies[0]} The past year was one of peace.{lies[1]} So be it.", memory=clean)
        own = [each for each in memory.suspects(question(fact)) if another_value(fact, document) in each.text]
        assert len(own) == 2 and own[0].together == own[1].together == sorted(each.span for each in own)
        assert own[0].answer == own[1].answer == " " + fact.value
        flagged += all(each.flagged and each.overwrote for each in own)
    assert flagged >= 3


def test_a_sentence_contradicts_the_first_that_tells_the_other_answer_of_the_same_thing(speaker):
    """Not the same answer of another name."""
    memory = speaker.memory(
        "The crops were good. Clara lives in Paris. Our commerce has been extended to new markets. Clara lives in "
        "Paris. Ben lives in Vienna. The past year was one of peace. The home of Clara is Vienna. We are at peace."
    )
    suspects = memory.suspects(" Where does Clara live?")
    first = min(each.span for each in suspects if "Paris" in each.text)
    assert suspects[0].contradicts == first and suspects[0].together == [suspects[0].span]


def test_a_text_that_contradicts_nothing_is_rarely_flagged(speaker, documents):
    """Without the only sentence that tells an answer the model may be sure of a wrong one, told of somebody else."""
    flags = 0
    for document in documents:
        memory = speaker.memory(torch.tensor([document.tokens[: document.facts[-1].stop]]))
        suspects = [suspect for fact in document.facts for suspect in memory.suspects(question(fact))]
        flags += sum(suspect.flagged for suspect in suspects)
        assert not any(suspect.flagged and suspect.probability < SURE for suspect in suspects)
    assert flags <= 0.1 * sum(len(document.facts) for document in documents)


def test_sentences_are_alike_that_share_a_rare_word_of_the_question():
    sentences = [{"ben", "is", "a"}, {"ada", "is", "a"}, {"home", "of", "ben"}, *[{"is", "a"}] * 7]
    assert sentences_alike(sentences, {"is", "ben", "home"})[:4] == [[0, 2], [], [0, 2], []]
    assert sentences_alike(sentences, {"is", "a"}) == [[]] * 10
    assert words_of([" Ben", ".", "ben", " is"]) == {"ben", "is"}


@pytest.mark.parametrize("name, n, most", [("facts-english", 20, 9), ("embedded", 8, 18)])
def test_sentences_are_cut_together_as_each_is_alone(name, n, most, documents):
    """Where a layer attends, one after the other: a pass to cut, and a pass to ask. Of few short sentences none is far
    enough from the ends to be cut with others."""
    model = HookedRecurrent.from_pretrained(name)
    told = [fact for document in documents for fact in document.facts][:n]
    memory = model.memory(" ".join(fact.sentence for fact in told))
    passes = []
    with model.hf_model.register_forward_pre_hook(lambda *_: passes.append(1)):
        found = memory.suspects(question(told[1]))
    assert len(found) == n and len(passes) <= most
    whole = model.logits_after(memory, question(told[1]))[0, -1].log_softmax(-1)
    for suspect in found:
        cut = memory
        for span in reversed(suspect.together):
            cut = cut.without(span, approximate=True)
        without = model.logits_after(cut, question(told[1]))[0, -1].log_softmax(-1)
        assert suspect.answer == model.to_string(int(without.argmax()))
        assert suspect.probability == pytest.approx(float(without.max().exp()), abs=1e-4)
        assert suspect.kl == pytest.approx(float((without.exp() * (without - whole)).sum()), abs=1e-4)
    # Answers hang little on states; the fast walk leaves the states of single cuts.
    spans = sorted(suspect.span for suspect in found)
    for each, span in zip(memory._without_each(spans), spans, strict=True):
        assert_close(each.state(1), memory.without(span, approximate=True).state(1))


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
        (lambda memory: memory.told([2.5]), "text or token ids"),
        (lambda memory: memory.held(3, row=1), "row: expected"),
        (lambda memory: memory.keeping(99), "after: expected 1 to"),
        (lambda memory: memory.told("", instead_of="Ben lives in Rome."), "new: expected a sentence"),
        (
            lambda memory: memory.told("Ben lives in Oslo.", instead_of="Ben lives in Bern."),
            "that was read, in the words",
        ),
        (lambda memory: memory.told("Ben lives in Oslo.", instead_of=""), "that was read, in the words"),
        (lambda memory: memory.suspects("Where does Ben live?"), "two sentences at least"),
        (lambda memory: memory.suspects(""), "at least one"),
    ],
)
def test_bad_input_is_refused(speaker, ask, match):
    with pytest.raises(InputError, match=match):
        ask(speaker.memory("Ben lives in Rome."))
