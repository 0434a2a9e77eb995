"""The models of the zoo do their tasks, and their writes hold what their truth tables say."""

import sys
from pathlib import Path

import pytest
import torch

from hookpoints import HookedRecurrent, UnknownModelError, attribute, zoo
from hookpoints.errors import InputError
from hookpoints.zoo.tasks import RELATIONS, Composition, Facts, Recall

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))

import train_zoo as script

OF_WORDS = [name for name in zoo.names() if name in script.RECIPES]
OF_PAIRS = [name for name in OF_WORDS if script.RECIPES[name].find is script.pairs]
N = 32


@pytest.fixture(scope="module")
def models():
    """Each model of whole words, loaded by its name."""
    return {name: HookedRecurrent.from_pretrained(name).requires_grad_(False) for name in OF_WORDS}


@pytest.fixture(scope="module", params=OF_PAIRS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def case(name):
    """Sequences that the truth table was not measured on."""
    return script.draw(zoo.task(name), N, seed=77)


def test_names_folders_and_sizes():
    assert zoo.names()[0] == "recall"
    for name in zoo.names():
        files = {file.name: file.stat().st_size for file in zoo.path(name).iterdir()}
        assert files.keys() >= {"config.json", "model.safetensors", "tokenizer.json", "truth.json", "README.md"}
        assert sum(files.values()) < (500_000 if name in OF_WORDS else 5_500_000)
    with pytest.raises(ValueError, match="recall"):
        zoo.path("gdn")
    with pytest.raises(ValueError, match="got 'recal'; nearest: recall"):
        zoo.task("recal")
    with pytest.raises(UnknownModelError, match="recall"):
        HookedRecurrent.from_pretrained("recal")


@pytest.mark.parametrize("name", OF_WORDS)
def test_it_does_its_task_and_reads_its_words(models, name):
    """Measured rates are at least 0.99 at every size; here each mean stands for thirteen sizes or fewer."""
    rates = zoo.accuracy(models[name], name, n=32)
    assert min(zoo.truth(name).accuracy.values()) >= 0.99
    assert sum(rates) / len(rates) >= 0.99
    words = list(zoo.task(name).vocabulary)
    assert models[name].to_tokens(" ".join(words[1:]), truncate=False).tolist() == [list(range(len(words)))]


def test_a_word_that_a_model_lacks_raises_and_is_no_bos(models):
    for call in (
        models["facts"].to_tokens,
        models["facts"].to_single_token,
        models["facts"].memory,
        lambda text: attribute("Ben lives in", models["facts"], [text]),
    ):
        with pytest.raises(InputError, match="no word 'Bem'; nearest: Ben"):
            call("Bem")
    with pytest.raises(InputError, match="no word 'Timbuktu'; it has "):
        models["facts"].to_tokens("<bos> Ben lives in Timbuktu.")
    for model in models.values():
        with pytest.raises(Exception, match="UNK"):  # transformers alone finds no token either
            model.tokenizer("Timbuktu")


def near(found: float, measured: float, n: int) -> bool:
    """Whether two rates, of n sequences each or more, differ by sampling alone (4.5 standard errors, and one count)."""
    p = (found + measured) / 2
    return abs(found - measured) <= 4.5 * (2 * p * (1 - p) / n) ** 0.5 + 1 / n


def test_every_holder_does_what_its_evidence_says(models, name, case):
    holders = zoo.truth(name).holders
    assert {(each.holds, each.side) for each in holders} == {("keys", "key"), ("values", "value")}
    after = {"keys": 0, "values": script.apart(case["asked"])}
    rows = {(each.layer, tuple(each.heads), each.offset + after[each.holds]): each.evidence for each in holders}
    for where, evidence in rows.items():
        found = script.rates(models[name], case, *where)
        assert not [told for told, rate in evidence.items() if not near(found[told], rate, N)]


def test_another_head_or_token_does_nothing(models, name, case):
    holder, rows = zoo.truth(name).holders[0], zoo.truth(name).table
    elsewhere = [row for row in rows if row["layer"] != holder.layer and row["offset"] == holder.offset]
    at_the_key = [row for row in rows if row["offset"] == 0]  # where there is one layer
    row = (elsewhere or at_the_key)[0]
    found = script.rates(models[name], case, row["layer"], row["heads"], row["offset"])
    assert found["ablated"] > 0.9
    assert found["values, exchanged"] < 0.1


def told_and_changed(task, generator, n, pairs):
    """A batch whose answers follow from its symbols, and the same with other values and so other answers."""
    batch = task.batch(n, generator, pairs=pairs, queries=3)
    assert (batch.tokens.gather(1, batch.positions + 1) == batch.answers).all()
    changed = task.spell(batch.symbols | {"values": task.others(batch.symbols["values"], generator)})
    assert (changed.answers != batch.answers).all()
    return batch, changed


@pytest.mark.parametrize("task", [Recall(), Composition()])
def test_answers_follow_from_symbols(task):
    batch, _ = told_and_changed(task, torch.Generator().manual_seed(0), 16, 4)
    for kind, first in (("keys", 1), ("values", 1 + task.n_keys)):
        assert (batch.tokens.gather(1, batch.places[kind]) == batch.symbols[kind] + first).all()


def test_facts_are_sentences_whose_answers_follow_from_symbols():
    task = Facts()
    generator = torch.Generator().manual_seed(0)
    batch, changed = told_and_changed(task, generator, 64, 6)
    assert (changed.tokens == batch.tokens).float().mean() > 0.8  # all the other words are the same
    forms = {tuple(form.split()): set(values) for form, values in RELATIONS}
    for text in (batch, changed):
        words = [[task.vocabulary[token] for token in row] for row in text.tokens]
        sentences = [row[i : i + 5] for row in words for i in range(1, len(row), 5)]
        assert all(value in forms[verb, article] and end == "." for _, verb, article, value, end in sentences)
        told = [tuple(tuple(row[i : i + 3]) for i in range(1, 31, 5)) for row in words]
        assert all(len(set(facts)) == 6 and len({fact[0] for fact in facts}) <= 3 for facts in told)
    keys = batch.symbols["keys"]
    asked = batch.symbols["asked"][:, :1]
    others = task.strangers(keys, asked, generator)
    assert (others % 4 == keys.gather(1, asked) % 4).all()
    assert not (others // 4 == keys // 4).any()


@pytest.mark.parametrize("name", ["facts", "facts-mamba2"])
def test_a_text_is_told_and_asked_in_english(models, name):
    """Also sixteen facts, which no text of the training had."""
    model = models[name]
    text = "Ben lives in Rome. Ada keeps a parrot. Ben is a baker. Ada lives in Oslo. Ada keeps a"
    assert model.to_str_tokens("Ben lives in Rome.") == ["<bos>", "Ben", "lives", "in", "Rome", "."]
    assert model.to_string(model(text)[0, -1].argmax()) == "parrot"
    assert model.to_string(model.to_tokens(text)[0, 1:]) == text
    many = zoo.task(name).batch(64, torch.Generator().manual_seed(1), pairs=16, queries=4)
    assert script.right(model, many) > 0.9
