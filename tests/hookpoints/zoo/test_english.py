"""Texts that tell facts between sentences of speeches, and the language models that remember them."""

import json
from dataclasses import replace
from statistics import fmean
from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from hookpoints import HookedRecurrent, embedded, zoo
from hookpoints.zoo import english

NAMES = [name for name in english.MODELS if name != "facts-english-kda" or "kimi_linear" in CONFIG_MAPPING_NAMES]
"""transformers has Kimi Linear from 5.17 on."""


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    return HookedRecurrent.from_pretrained(request.param).requires_grad_(False)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("wordings", ["told", "held_out"])
def test_a_document_says_where_its_facts_and_questions_are(split, wordings):
    options: Any = {"split": split, "wordings": wordings, "same": 0.5, "interleaved": 0.5, "length": 512}
    documents = english.draw(16, facts=6, questions=6, **options)
    assert documents == english.draw(16, facts=6, questions=6, **options)
    ids = english.writer(split).ids
    for document in documents:
        tokens = document.tokens
        assert len(tokens) == 512
        assert len({(fact.name, fact.relation) for fact in document.facts}) == len(document.facts)
        for fact in document.facts:
            assert tokens[fact.start : fact.stop] == ids(fact.sentence)
            assert [tokens[fact.place]] == [fact.answer] == ids(fact.value)
            forms = getattr(english.RELATIONS[fact.relation], wordings)
            assert fact.sentence in [form.format(n=fact.name, v=fact.value) for form in forms]
            assert english.held_out(fact.name, fact.relation, fact.value) == (split == "test")
        for question in document.questions:
            assert question.fact in document.facts
            assert question.fact.place < question.position
            assert tokens[question.position + 1] == question.fact.answer


def test_sentences_between_the_facts_are_of_held_out_speeches():
    writer = english.writer()
    (document,) = english.draw(1, facts=1, questions=0, fillers=1.0)
    before = document.tokens[1 : document.facts[0].start]
    assert before in writer.fillers
    assert len(writer.fillers) > 500
    assert {ids[0] for ids in writer.fillers} <= {
        writer.ids(each)[0] for each in english.sentences(embedded.text("test"))
    }


def test_training_lacks_a_relation_of_eight_names_and_no_name():
    kept = {(name, relation) for name in english.NAMES for relation in english.RELATIONS}
    lacking = {key for key in kept if english.never_told(*key)}
    assert len(lacking) == len({name for name, _ in lacking}) == 8
    assert {relation for _, relation in lacking} == {*english.RELATIONS}


@pytest.mark.parametrize("name", NAMES)
def test_the_truth_is_what_texts_are_drawn_from_and_goals_were_reached(name):
    truth = zoo.truth(name)
    assert truth.told == json.loads(json.dumps(english.told()))
    assert truth.accuracy["8 facts"] >= 0.95
    assert truth.facts["right with 8 facts in wordings that training never had"] >= 0.9
    assert truth.facts["perplexity of held-out speeches"] <= 30
    assert (zoo.path(name) / "model.safetensors").stat().st_size <= 5_000_000
    with pytest.raises(ValueError, match=r"zoo\.english\.draw"):
        zoo.task(name)


def test_it_answers_what_it_was_told(model):
    """In wordings that training never had; and after another value in every fact, the other value."""
    documents = english.draw(8, facts=4, seed=50, wordings="held_out", length=256)
    assert fmean(right for _, right in english.answered(model, documents)) > 0.85
    changed = []
    for document in documents:
        tokens = [*document.tokens]
        for fact in document.facts:
            tokens[fact.place] = another(fact)
        questions = [replace(each, fact=replace(each.fact, answer=another(each.fact))) for each in document.questions]
        changed.append(replace(document, tokens=tokens, questions=questions))
    assert fmean(right for _, right in english.answered(model, changed)) > 0.85


def another(fact: english.ToldFact) -> int:
    """The token of another value of the same relation."""
    values = english.RELATIONS[fact.relation].values
    (token,) = english.writer().ids(values[values.index(fact.value) - 1])
    return token


def test_a_text_is_told_and_asked_in_english(model):
    text = "Ben lives in Rome. Ada keeps a parrot. The state of the union is strong. Where does Ben live?"
    assert model.to_string(model(text)[0, -1].argmax()) == " Rome"
    document = english.draw(1)[0]
    whole = document.tokens[: document.facts[-1].stop]
    assert model.to_tokens(model.to_string(whole[1:])).tolist() == [whole]
    assert "ĠRome" not in model.tokenizer.tokenize(" Romeo")
