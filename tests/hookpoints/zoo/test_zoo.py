"""The models of the zoo do their tasks, and their writes hold what their truth tables say."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from hookpoints import HookedRecurrent, UnknownModelError, WriteEdit, attribute, zoo
from hookpoints.errors import InputError
from hookpoints.zoo.tasks import RELATIONS, Composition, Facts, Recall

OF_WORDS = [name for name in zoo.names() if name not in zoo.english.MODELS]
OF_PAIRS = [name for name in OF_WORDS if name not in ("induction", "parity")]
N = 32

Case = Mapping[str, zoo.Batch]
"""Sequences that ask for one pair ("asked"), the same that ask for the next one ("next"), and the same with another
symbol of a kind in the pair that is asked for ("keys", "values"); such a key is in none of the others."""


def draw(task: zoo.Task, n: int, seed: int) -> Case:
    """n sequences of a middling size. The pair that is asked for is never the last."""
    generator, count = torch.Generator().manual_seed(seed), task.sizes[2 * len(task.sizes) // 3]["pairs"]
    drawn = task.batch(n, generator, pairs=count + 1).symbols
    keys, values, asked = drawn["keys"][:, :count], drawn["values"][:, :count], drawn["asked"] % (count - 1)
    new_keys = task.strangers(keys, asked, generator) if isinstance(task, Facts) else drawn["keys"][:, count:]
    changes = {
        "asked": {},
        "next": {"asked": asked + 1},
        "keys": {"keys": keys.scatter(1, asked, new_keys)},
        "values": {"values": values.scatter(1, asked, task.others(values.gather(1, asked), generator))},
    }
    same = {**drawn, "keys": keys, "values": values, "asked": asked}
    return {name: task.spell(same | change) for name, change in changes.items()}


def apart(batch: zoo.Batch) -> int:
    """Tokens from a key to its value."""
    return int(batch.places["values"][0, 0] - batch.places["keys"][0, 0])


def sides(model: HookedRecurrent, batch: zoo.Batch, layer: int, heads: Sequence[int], offset: int) -> list[Tensor]:
    """Key sides [N,H,K] and value sides [N,H,V] of the writes ``offset`` tokens after the key of each pair that is
    asked for (N = B Q)."""
    at, form = batch.places["keys"].gather(1, batch.symbols["asked"]) + offset, model.recurrence(batch.tokens, layer)
    return [s[torch.arange(len(at))[:, None], at][:, :, list(heads)].flatten(0, 1) for s in (form.k, form.u)]


def right(model: HookedRecurrent, batch: zoo.Batch) -> float:
    """Share of right answers."""
    return (model(batch.tokens).argmax(dim=-1).gather(1, batch.positions) == batch.answers).double().mean().item()


def share(
    model: HookedRecurrent,
    case: Case,
    question: zoo.Batch,
    layer: int,
    heads: Sequence[int],
    offset: int,
    writes: Sequence[Tensor],
    mode: Literal["replace", "add"] = "replace",
) -> float:
    """Share of the answers of ``question`` to its question, after the pairs of ``case["asked"]`` with edited writes."""
    pairs, start = case["asked"], int(case["asked"].places["values"].max()) + 1
    at = pairs.places["keys"].gather(1, pairs.symbols["asked"])[:, 0] + offset
    edits = [
        [WriteEdit(layer, head, int(position), k, u, mode) for head, k, u in zip(heads, keys, values, strict=True)]
        for position, keys, values in zip(at, *writes, strict=True)
    ]
    with model.edits(edit_rows=edits):
        tokens = torch.cat([pairs.tokens[:, :start], question.tokens[:, start:]], dim=1)
        return right(model, replace(question, tokens=tokens))


def rates(model: HookedRecurrent, case: Case, layer: int, heads: Sequence[int], offset: int) -> dict[str, float]:
    """Shares of answers after interventions on the writes of some heads, ``offset`` tokens after the asked pair's key.

    "ablated": right answers without the writes. For each kind of symbol that ``case`` has, shares of the answer of the
    sequences with another symbol, asked for as there, when the writes are those of these sequences: "exchanged" whole,
    or one side. Where it has the next pair, "another pair": when they are those of the next pair; "other pairs right":
    right answers about the next pair when the value was exchanged.
    """
    where = layer, heads, offset
    own = {kind: sides(model, batch, *where) for kind, batch in case.items()}
    k, u = own["asked"]
    told = {"ablated": ("asked", (0 * k, 0 * u))}
    for kind in [kind for kind in own if kind not in ("asked", "next")]:
        new = {"exchanged": own[kind], "key side": (own[kind][0], u), "value side": (k, own[kind][1])}
        new |= {"another pair": own["next"]} if "next" in own else {}
        told |= {f"{kind}, {name}": (kind, writes) for name, writes in new.items()}
    told |= {"other pairs right": ("next", own["values"])} if "next" in own else {}
    return {name: share(model, case, case[kind], *where, writes) for name, (kind, writes) in told.items()}


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
    return draw(zoo.task(name), N, seed=77)


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
    after = {"keys": 0, "values": apart(case["asked"])}
    rows = {(each.layer, tuple(each.heads), each.offset + after[each.holds]): each.evidence for each in holders}
    for where, evidence in rows.items():
        found = rates(models[name], case, *where)
        assert not [told for told, rate in evidence.items() if not near(found[told], rate, N)]


def test_another_head_or_token_does_nothing(models, name, case):
    holder, rows = zoo.truth(name).holders[0], zoo.truth(name).table
    elsewhere = [row for row in rows if row["layer"] != holder.layer and row["offset"] == holder.offset]
    at_the_key = [row for row in rows if row["offset"] == 0]  # where there is one layer
    row = (elsewhere or at_the_key)[0]
    found = rates(models[name], case, row["layer"], row["heads"], row["offset"])
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
    assert right(model, many) > 0.9
