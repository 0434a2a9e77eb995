"""What a memory of `recall` holds, in words, by a dictionary of its mean writes; and what the model answers after other
facts were written."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata
from saes import tied_sae
from torch import Tensor
from torch.nn.functional import normalize

from hookpoints import HookedRecurrent, zoo
from hookpoints.errors import InputError
from hookpoints.memory.facts import joined_facts
from hookpoints.zoo.tasks import Facts
from sae_lens_writesae import Fact, label_atoms, load_sae, read_memory
from sae_lens_writesae.sae import WriteProductSAE, WriteProductSAEConfig

pytestmark = pytest.mark.usefixtures("no_grad")
LAYER, HEAD = 1, 1
HOOK = f"blocks.{LAYER}.mixer.heads.{HEAD}.hook_state_vec"


class World(NamedTuple):
    """The model, a dictionary of its mean writes by symbol, and texts."""

    model: HookedRecurrent
    dictionary: Any
    words: list[str]
    """Of all tokens."""

    def texts(self, pairs: int, count: int, seed: int) -> Tensor:
        """[count,2 pairs + 2] tokens: a start, keys and values one after the other, and a key that is asked."""
        task: Any = zoo.task("recall")
        batch = task.batch(count, torch.Generator().manual_seed(seed), pairs=pairs, queries=1)
        return batch.tokens[:, : 2 * pairs + 2]

    def states(self, tokens: Tensor) -> Tensor:
        return self.model.recurrence(tokens, LAYER).final_state()[:, HEAD]

    def facts(self, text: Tensor) -> list[tuple[str, str]]:
        """What a text says."""
        said = [self.words[token] for token in text.tolist()][1:-1]
        return list(zip(said[::2], said[1::2]))

    def spelled(self, tokens: Tensor) -> list[list[str]]:
        return [[self.words[token] for token in text] for text in tokens.tolist()]

    def label(self, dictionary: Any, tokens: Tensor) -> None:
        label_atoms(dictionary, self.states(tokens), self.spelled(tokens))

    def answer(self, memory: Any, key: str) -> str:
        """What the model says after a key."""
        logits = self.model.logits_after(memory, torch.tensor([[self.words.index(key)]]))
        return self.words[int(logits[0, -1].argmax())]


class Told(NamedTuple):
    """A text of four pairs, by its memory."""

    memory: Any
    facts: list[tuple[str, str]]
    other: str
    """A value that no key of it has."""


def dictionary(keys: Tensor, values: Tensor, hook: str | None = HOOK, **fields: Any) -> Any:
    shape: dict[str, Any] = {"d_in": keys.shape[1] * values.shape[1], "d_k": keys.shape[1], "encoder": "pursuit"}
    sizes = {"d_sae": len(keys) * len(values), "f_key": len(keys), "f_value": len(values)}
    sae = WriteProductSAE(WriteProductSAEConfig(**{**shape, **sizes, **fields}, metadata=SAEMetadata(hook_name=hook)))
    sae.key_atoms.copy_(keys)
    sae.value_atoms.copy_(values)
    return sae


@pytest.fixture(scope="module")
def world() -> World:
    with torch.no_grad():
        task: Any = zoo.task("recall")
        model = HookedRecurrent.from_pretrained("recall")
        tokenizer: Any = model.tokenizer
        words = [tokenizer.decode([token]).strip() for token in range(model.cfg.d_vocab)]
        batch = task.batch(512, torch.Generator().manual_seed(9), pairs=12)
        factors = model.recurrence(batch.tokens, LAYER)
        at = batch.places["keys"][:, :-1] + 2  # where the head writes a pair
        rows = torch.arange(512)[:, None]
        sides = []
        for side, kind in ((factors.k, "keys"), (factors.u, "values")):
            symbols = batch.symbols[kind][:, :-1].flatten()
            vectors = side[rows, at, HEAD].flatten(0, 1)
            sides.append(normalize(torch.stack([vectors[symbols == n].mean(0) for n in range(64)]), dim=1))
        made = World(model, dictionary(*sides), words)
        made.label(made.dictionary, made.texts(4, 1000, 1))
    return made


@pytest.fixture(scope="module")
def told(world: World) -> Told:
    text = world.texts(4, 1, 7)
    facts = world.facts(text[0])
    other = next(word for word in world.words[65:] if word not in dict(facts).values())
    return Told(world.model.memory(text), facts, other)


def elsewhere(world: World, **metadata: Any) -> Any:
    """The same dictionary of the other head."""
    same = dictionary(*world.dictionary.directions, hook=HOOK.replace(f"heads.{HEAD}", f"heads.{1 - HEAD}"))
    same.cfg.metadata.labels = world.dictionary.cfg.metadata.labels | metadata
    return same


def pairs_of(facts: Any) -> set[tuple[str, str]]:
    return {(fact.key, fact.value) for fact in facts}


# ---------------------------------------------------------------------------------------- names


def test_words_of_other_texts_name_no_atoms(world: World) -> None:
    """Few states and many words: the largest of many correlations by chance is large."""
    tokens = world.texts(4, 120, 1)
    unnamed = dictionary(*world.dictionary.directions)
    named = []
    for texts in (tokens, tokens.roll(-1, 0)):
        label_atoms(unnamed, world.states(tokens), world.spelled(texts))
        labels = unnamed.cfg.metadata.labels
        named.append([word for side in ("keys", "values") for word in labels[side]["words"] if word])
    assert len(set(named[0])) >= 0.8 * 128
    assert len(named[1]) <= 0.03 * 128


# ---------------------------------------------------------------------------------------- reading


def test_words_name_the_atoms(world: World) -> None:
    labels = world.dictionary.cfg.metadata.labels
    for side, first in (("keys", 1), ("values", 65)):
        right = [word == world.words[first + atom] for atom, word in enumerate(labels[side]["words"])]
        assert sum(right) >= 62
        assert all(cosine > 0.5 for cosine, named in zip(labels[side]["correlations"], right) if named)


@pytest.mark.parametrize("pairs", [4, 8])
def test_the_facts_of_a_text_are_read_from_its_state(world: World, pairs: int) -> None:
    tokens = world.texts(pairs, 100, 50 + pairs)
    states = world.states(tokens)
    assert_read(states, world.dictionary, [set(world.facts(text)) for text in tokens], pairs, 0.95)
    assert_read(states, world.dictionary, [set(world.facts(text)) for text in tokens], None, 0.9)
    first = read_memory(states, world.dictionary, pairs)[0][0]
    keys, values = world.dictionary.directions
    projection = keys[first.key_atom] @ states[0] @ values[first.value_atom] / states[0].norm()
    assert first.coefficient == pytest.approx(float(projection), abs=0.15)


def assert_read(states: Tensor, sae: Any, told: list[set[tuple[str, str]]], n: int | None, least: float) -> None:
    """Such a share of what texts told is read from their states, such a share of what is read was told, and next to
    nothing of it by another text."""
    found = read_memory(states, sae, n)
    read = [pairs_of(facts) for facts in found]
    hits = sum(len(own & facts) for own, facts in zip(told, read))
    assert hits >= least * max(sum(map(len, told)), sum(map(len, read)))
    assert sum(len(own & facts) for own, facts in zip(told, read[1:] + read[:1])) <= 0.1 * sum(map(len, told))
    for facts in found:
        strengths = [fact.strength for fact in facts]
        assert strengths == sorted(strengths, reverse=True) and len(facts) == (n or len(facts))


def test_a_memory_says_what_it_holds(world: World, told: Told) -> None:
    facts = told.memory.facts(world.dictionary, layer=LAYER, head=HEAD, n=4)
    assert pairs_of(facts) == set(told.facts)
    assert facts == told.memory.facts(world.dictionary, n=4)
    assert str(facts[0]) == f"{facts[0].key} → {facts[0].value} {facts[0].coefficient:.2f}"
    both = told.memory.facts([world.dictionary, world.dictionary], n=4)
    strength = {(fact.key, fact.value): 2 * abs(fact.coefficient) * fact.named for fact in facts}
    assert {(fact.key, fact.value): pytest.approx(fact.coefficient) for fact in both} == strength
    assert [fact.coefficient for fact in both] == sorted((fact.coefficient for fact in both), reverse=True)


def test_facts_of_several_heads_add_up() -> None:
    one = [Fact("Ben", "Rome", -0.5, 1, 2, 0.8), Fact("Ada", "Oslo", 0.6, 3, 4, 0.9)]
    other = [Fact("Ben", "Rome", 0.4, 7, 8, 1.0), Fact("key 3", "value 1", 0.9, 3, 1, 0.0)]
    facts = joined_facts([one, other])
    assert [str(fact) for fact in facts] == ["Ben → Rome 0.80", "Ada → Oslo 0.54", "key 3 → value 1 0.00"]
    assert (facts[0].key_atom, facts[0].value_atom) in ((1, 2), (7, 8))
    assert joined_facts([one, other], 1) == facts[:1]


def test_labels_are_saved_with_the_dictionary(world: World, tmp_path: Path) -> None:
    states = world.states(world.texts(4, 5, 3))
    world.dictionary.save_model(tmp_path)
    for loaded in (load_sae(tmp_path), SAE.load_from_disk(tmp_path)):
        found: Any = loaded
        assert read_memory(states, found, 4) == read_memory(states, world.dictionary, 4)


# ---------------------------------------------------------------------------------------- what cannot be read


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"n": 0}, r"n: expected a number of facts from 1 on, or None, got 0"),
        ({"layer": 1, "head": 0}, r"layer, head: expected \(1, 1\), the head of the dictionary, got \(1, 0\)"),
        ({"row": 2}, r"row: expected 0 to 0, got 2"),
    ],
    ids=str,
)
def test_what_is_asked_wrongly_has_an_answer(world: World, told: Told, asked: dict[str, int], said: str) -> None:
    with pytest.raises(InputError, match=f"^{said}"):
        told.memory.facts(world.dictionary, **asked)


def test_a_dictionary_that_names_no_head_is_told_one(world: World, told: Told) -> None:
    nowhere = dictionary(*world.dictionary.directions, hook=None)
    with pytest.raises(InputError, match=r"^layer, head: expected both"):
        told.memory.facts(nowhere)
    with pytest.raises(InputError, match=r"^head: expected 0 to 1 in layer 1, got 5"):
        told.memory.facts(nowhere, layer=1, head=5)
    assert told.memory.facts(nowhere, layer=1, head=1, n=1)[0].key.startswith("key ")


def test_what_cannot_be_read_has_an_answer(world: World, told: Told) -> None:
    states = world.states(world.texts(4, 2, 7))
    with pytest.raises(InputError, match=r"^states: expected \[N,K,V\] with K, V = \(32, 32\).*got \(2, 32, 31\)"):
        read_memory(states[..., :31], world.dictionary)
    with pytest.raises(InputError, match=r"^texts: expected one of each of the 2 states, got 1"):
        label_atoms(world.dictionary, states, [["Ada"]])
    rank_one: Any = tied_sae(torch.eye(32), torch.eye(32), 3, target="state")
    with pytest.raises(InputError, match=r"^dictionary: expected one of pairs .*got WriteTopKSAE"):
        told.memory.facts(rank_one)
    assert read_memory(torch.zeros(1, 32, 32), world.dictionary) == [[]]
    assert read_memory(states[:0], world.dictionary) == []


WHOLE = {side: {"words": ["Ada"] * 64, "correlations": [1.0] * 64, "sizes": [1.0] * 64} for side in ("keys", "values")}


@pytest.mark.parametrize(
    "labels",
    [
        "words",
        {"keys": {}},
        {"keys": {"words": ["Ada"], "correlations": [1.0], "sizes": [1.0]}},
        {"keys": WHOLE["keys"] | {"words": [1] * 64}},
        {"values": WHOLE["values"] | {"correlations": ["high"] * 64}},
        {"values": WHOLE["values"] | {"correlations": [float("nan")] * 64}},
    ],
    ids=str,
)
def test_damaged_labels_are_refused(world: World, labels: Any) -> None:
    damaged = dictionary(*world.dictionary.directions)
    damaged.cfg.metadata.labels = {**WHOLE, **labels} if isinstance(labels, dict) else labels
    with pytest.raises(InputError, match=r"^labels: expected words, correlations and sizes of 64 atoms"):
        read_memory(torch.zeros(1, 32, 32), damaged)


@pytest.mark.parametrize("encoder", ["topk", "pursuit"])
def test_a_dictionary_of_writes_reads_states_and_says_so(world: World, told: Told, encoder: str) -> None:
    hook = HOOK.replace("state", "write")
    of_writes = dictionary(*(3 * side for side in world.dictionary.directions), hook=hook, encoder=encoder)
    of_writes.cfg.metadata.labels = world.dictionary.cfg.metadata.labels
    with pytest.warns(UserWarning, match="a dictionary of writes reads states"):
        facts = told.memory.facts(of_writes, n=4)
    assert pairs_of(facts) == set(told.facts)


# ---------------------------------------------------------------------------------------- writing


def test_the_model_answers_what_was_written(world: World) -> None:
    """Another value for one key: the new answer, the answers about all others, and nothing of it for another key."""
    new, others, null = [], [], []
    values = torch.randint(65, 129, (30,), generator=torch.Generator().manual_seed(2)).tolist()
    for text, token in zip(world.texts(4, 30, 11), values):
        memory = world.model.memory(text[None])
        before = memory.state(LAYER)
        facts = dict(world.facts(text))
        (key, old), (second, its_own), *_ = facts.items()
        if (value := world.words[token]) in facts.values():
            continue
        changed = memory.with_fact(world.dictionary, key, value, instead_of=old)
        assert changed.edited and not memory.edited and torch.equal(memory.state(LAYER), before)
        assert torch.equal(changed.state(LAYER, 1 - HEAD), memory.state(LAYER, 1 - HEAD))
        new.append(world.answer(changed, key) == value)
        others += [world.answer(changed, other) == facts[other] for other in facts.keys() - {key}]
        moved = memory.with_fact(world.dictionary, second, value, instead_of=its_own)
        null.append(world.answer(moved, key) == value)
    assert sum(new) >= 0.95 * len(new) and sum(others) >= 0.98 * len(others) and sum(null) <= 0.1 * len(null)


def test_heads_whose_dictionary_lacks_a_word_stay_and_are_named(world: World, told: Told) -> None:
    """`recall` with a second dictionary, of the other head, that knows no key."""
    key, old = told.facts[0]
    partial = elsewhere(world, keys=world.dictionary.cfg.metadata.labels["keys"] | {"words": [None] * 64})
    with pytest.warns(UserWarning, match=rf"lacks a word stay as they are: L1H0 lacks '{key}'$"):
        changed = told.memory.with_fact([partial, world.dictionary], key, told.other, instead_of=old)
    alone = told.memory.with_fact(world.dictionary, key, told.other, instead_of=old)
    assert torch.equal(changed.state(LAYER), alone.state(LAYER))
    with pytest.raises(InputError, match=r"got others: L1H0 lacks 'Tokio'; nearest: Tokyo.*; L1H1 lacks 'Tokio'"):
        told.memory.with_fact([elsewhere(world), world.dictionary], key, "Tokio", instead_of=old)


def test_a_fact_comes_and_goes(world: World) -> None:
    gone, come, still, others = [], [], [], []
    for text in [*world.texts(4, 20, 12), *world.texts(8, 20, 12)]:
        facts = dict(world.facts(text))
        key, value = next(iter(facts.items()))
        without = world.model.memory(text[None]).with_fact([world.dictionary], key, None, instead_of=value)
        gone.append((key, value) not in pairs_of(without.facts(world.dictionary)))
        still.append(world.answer(without, key) == value)
        others += [world.answer(without, other) == facts[other] for other in facts.keys() - {key}]
        come.append(world.answer(without.with_fact(world.dictionary, key, value), key) == value)
    assert sum(gone) == len(gone) and sum(come[:20]) >= 0.95 * 20
    assert sum(still) <= 0.1 * len(still) and sum(others) >= 0.98 * len(others)


def test_a_fact_is_rewritten_in_each_head_that_has_it(world: World, told: Told) -> None:
    """Several heads of one layer, in any order, of which one holds the fact."""
    other = elsewhere(world)
    (key, old), (_, new), *_ = told.facts
    for order in ([world.dictionary, other], [other, world.dictionary]):
        told.memory.with_fact(order, key, None, instead_of=old)
        for head, own in enumerate((other, world.dictionary)):
            states = [told.memory.with_fact(heads, key, new).state(LAYER, head) for heads in (order, own)]
            assert torch.equal(*states)


def test_signs_of_atoms_do_not_matter(world: World, told: Told) -> None:
    """A pair has one sign, which either atom may carry: sizes are those of positive pairs, and what is written is the
    same."""
    g = torch.Generator().manual_seed(4)
    sides = world.dictionary.directions
    flips = [torch.randint(2, (len(side), 1), generator=g) * 2 - 1 for side in sides]
    turned = dictionary(*(side * flip for side, flip in zip(sides, flips)))
    world.label(turned, world.texts(4, 1000, 1))
    for side in ("keys", "values"):
        sizes, plain = (torch.tensor(each.cfg.metadata.labels[side]["sizes"]) for each in (turned, world.dictionary))
        torch.testing.assert_close(sizes.abs(), plain.abs())
    key, old = told.facts[0]
    changed, plain = (
        told.memory.with_fact(pairs, key, told.other, instead_of=old).state(LAYER)
        for pairs in (turned, world.dictionary)
    )
    torch.testing.assert_close(changed, plain)


def test_what_cannot_be_written_says_why(world: World, told: Told) -> None:
    (key, value), (other, _), *_ = told.facts
    unknown = r"^expected words that name atoms, got others: L1H1 .*'Tokio'; nearest: Tokyo"
    with pytest.raises(InputError, match=unknown):
        told.memory.with_fact(world.dictionary, key, "Tokio", instead_of=value)
    with pytest.raises(InputError, match=rf"^instead_of: expected a value that '{other}' has here, got '{value}'"):
        told.memory.with_fact(world.dictionary, other, None, instead_of=value)
    with pytest.raises(InputError, match=r"^value: expected a word, or instead_of"):
        told.memory.with_fact(world.dictionary, key, None)


# ---------------------------------------------------------------------------------------- the dictionary that ships


def states_of_facts(pairs: int, count: int, seed: int) -> tuple[HookedRecurrent, Tensor, list[dict[str, str]]]:
    """The model `facts`, tokens of texts [N,1 + 5 pairs], and what they tell."""
    model = HookedRecurrent.from_pretrained("facts")
    batch = Facts().batch(count, torch.Generator().manual_seed(seed), pairs=pairs)
    return model, batch.tokens[:, : 1 + 5 * pairs], Facts().told(batch.symbols)


def test_a_value_of_another_relation_is_written_with_a_warning() -> None:
    sae: Any = load_sae(zoo.path("facts") / "pairs")
    memory = HookedRecurrent.from_pretrained("facts").memory("Ben lives in Rome . Ada keeps a parrot .")
    memory.with_fact(sae, "Ben lives in", "Oslo", instead_of="Rome")
    with pytest.warns(UserWarning, match=r"^value: expected one that 'Ben lives in', .* got 'parrot'; the model may"):
        memory.with_fact(sae, "Ben lives in", "parrot", instead_of="Rome")
    for damaged in ("all", [["Rome"]], [[200]], [[0]] * 161, 3):
        sae.cfg.metadata.labels |= {"seen": damaged}
        with pytest.raises(InputError, match=r"^labels: expected the values of each key under 'seen', got others"):
            memory.with_fact(sae, "Ben lives in", "Oslo", instead_of="Rome")


@pytest.mark.parametrize(("pairs", "least"), [(2, 0.99), (4, 0.98), (8, 0.98), (16, 0.97), (24, 0.9), (32, 0.8)])
def test_the_shipped_dictionary_reads_english_facts_from_states(pairs: int, least: float) -> None:
    """They are counted by what their pairs usually are, and not by their share of the state, which is the smaller the
    more facts it holds."""
    model, tokens, told = states_of_facts(pairs, 40, seed=pairs)
    states = model.recurrence(tokens, 0).final_state()[:, 0]
    for n in (pairs, None):
        assert_read(states, load_sae(zoo.path("facts") / "pairs"), [set(facts.items()) for facts in told], n, least)
