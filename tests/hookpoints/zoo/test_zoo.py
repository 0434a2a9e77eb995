"""The models of the zoo do their tasks, and their writes hold what their truth tables say."""

import sys
from pathlib import Path

import pytest
import torch

from hookpoints import HookedRecurrent, UnknownModelError, zoo
from hookpoints.zoo.tasks import Composition, Recall

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))

import train_zoo as script

OF_PAIRS = [name for name in zoo.names() if script.RECIPES[name].find is script.pairs]
N = 32


@pytest.fixture(scope="module")
def models():
    """Each model, loaded by its name."""
    return {name: HookedRecurrent.from_pretrained(name).requires_grad_(False) for name in zoo.names()}


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
        assert sum(files.values()) < 500_000
    with pytest.raises(ValueError, match="recall"):
        zoo.path("gdn")
    with pytest.raises(UnknownModelError, match="recall"):
        HookedRecurrent.from_pretrained("recal")


@pytest.mark.parametrize("name", zoo.names())
def test_it_does_its_task_and_reads_its_words(models, name):
    """Measured rates are at least 0.99 at every size; here each mean stands for thirteen sizes or fewer."""
    rates = zoo.accuracy(models[name], name, n=32)
    assert min(zoo.truth(name).accuracy.values()) >= 0.99
    assert sum(rates) / len(rates) >= 0.99
    words = list(zoo.task(name).vocabulary)
    assert models[name].to_tokens(" ".join(words[1:]), truncate=False).tolist() == [list(range(len(words)))]


def near(found: float, measured: float, n: int) -> bool:
    """Whether two rates, of n sequences each or more, differ by sampling alone (4.5 standard errors, and one count)."""
    p = (found + measured) / 2
    return abs(found - measured) <= 4.5 * (2 * p * (1 - p) / n) ** 0.5 + 1 / n


def test_every_holder_does_what_its_evidence_says(models, name, case):
    holders = zoo.truth(name).holders
    assert {(each.holds, each.side) for each in holders} == {("keys", "key"), ("values", "value")}
    rows = {(each.layer, tuple(each.heads), each.offset + (each.holds == "values")): each.evidence for each in holders}
    for where, evidence in rows.items():
        found = script.rates(models[name], case, *where)
        assert not [told for told, rate in evidence.items() if not near(found[told], rate, N)]


def test_another_head_or_token_does_nothing(models, name, case):
    holder, rows = zoo.truth(name).holders[0], zoo.truth(name).table
    row = next(row for row in rows if row["layer"] != holder.layer and row["offset"] == holder.offset)
    found = script.rates(models[name], case, row["layer"], row["heads"], row["offset"])
    assert found["ablated"] > 0.9
    assert found["values, exchanged"] < 0.1


@pytest.mark.parametrize("task", [Recall(), Composition()])
def test_answers_follow_from_symbols(task):
    generator = torch.Generator().manual_seed(0)
    batch = task.batch(16, generator, pairs=4, queries=3)
    assert (batch.tokens.gather(1, batch.positions + 1) == batch.answers).all()
    changed = task.spell(batch.symbols | {"values": task.others(batch.symbols["values"], generator)})
    assert (changed.answers != batch.answers).all()
    for kind, first in (("keys", 1), ("values", 1 + task.n_keys)):
        assert (batch.tokens.gather(1, batch.places[kind]) == batch.symbols[kind] + first).all()
