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
from hookpoints.zoo.tasks import RELATIONS, Facts
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

    def answer(self, memory: Any, key: str) -> str:
        """What the model says after a key."""
        logits = self.model.logits_after(memory, torch.tensor([[self.words.index(key)]]))
        return self.words[int(logits[0, -1].argmax())]


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
        tokens = made.texts(4, 1000, 1)
        label_atoms(made.dictionary, made.states(tokens), [[words[t] for t in text] for text in tokens.tolist()])
    return made


# ---------------------------------------------------------------------------------------- names


def test_words_of_other_texts_name_no_atoms(world: World) -> None:
    """Few states and many words: the largest of many correlations by chance is large."""
    tokens = world.texts(4, 120, 1)
    unnamed = dictionary(*world.dictionary.directions)
    words = [[world.words[token] for token in text] for text in tokens.tolist()]
    named = []
    for texts in (words, words[1:] + words[:1]):
        label_atoms(unnamed, world.states(tokens), texts)
        labels = unnamed.cfg.metadata.labels
        named.append([word for side in ("keys", "values") for word in labels[side]["words"] if word])
    right = [world.words.index(word) - 1 for word in named[0]]
    assert len(set(right)) >= 0.8 * 128
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
    found = read_memory(states, world.dictionary, pairs)
    said = [set(world.facts(text)) for text in tokens]
    read = [{(fact.key, fact.value) for fact in facts} for facts in found]
    assert sum(len(a & b) for a, b in zip(said, read)) >= 0.95 * 100 * pairs
    assert sum(len(a & b) for a, b in zip(said, read[1:] + read[:1])) <= 0.1 * 100 * pairs
    for facts in found:
        strengths = [fact.strength for fact in facts]
        assert len(facts) == pairs and strengths == sorted(strengths, reverse=True)
    strong = read_memory(states, world.dictionary)
    right = [(fact.key, fact.value) in facts for own, facts in zip(strong, said) for fact in own]
    assert sum(right) >= 0.9 * len(right) and sum(right) >= 0.9 * 100 * pairs
    first = found[0][0]
    keys, values = world.dictionary.directions
    projection = keys[first.key_atom] @ states[0] @ values[first.value_atom] / states[0].norm()
    assert first.coefficient == pytest.approx(float(projection), abs=0.15)


def test_a_memory_says_what_it_holds(world: World) -> None:
    text = world.texts(4, 1, 7)
    memory = world.model.memory(text)
    facts = memory.facts(world.dictionary, layer=LAYER, head=HEAD, n=4)
    assert {(fact.key, fact.value) for fact in facts} == set(world.facts(text[0]))
    assert facts == memory.facts(world.dictionary, n=4)
    assert str(facts[0]) == f"{facts[0].key} → {facts[0].value} {facts[0].coefficient:.2f}"
    both = memory.facts([world.dictionary, world.dictionary], n=4)
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


def test_what_is_asked_wrongly_has_an_answer(world: World) -> None:
    text = world.texts(4, 2, 7)
    memory = world.model.memory(text)
    states = world.states(text)
    with pytest.raises(InputError, match=r"^n: expected a number of facts from 1 on, or None, got 0"):
        memory.facts(world.dictionary, n=0)
    with pytest.raises(InputError, match=r"^layer, head: expected \(1, 1\), the head of the dictionary, got \(1, 0\)"):
        memory.facts(world.dictionary, layer=1, head=0)
    with pytest.raises(InputError, match=r"^row: expected 0 to 1, got 2"):
        memory.facts(world.dictionary, row=2)
    with pytest.raises(InputError, match=r"^states: expected \[N,K,V\] with K, V = \(32, 32\).*got \(2, 32, 31\)"):
        read_memory(states[..., :31], world.dictionary)
    with pytest.raises(InputError, match=r"^texts: expected one of each of the 2 states, got 1"):
        label_atoms(world.dictionary, states, [["Ada"]])
    rank_one: Any = tied_sae(torch.eye(32), torch.eye(32), 3, target="state")
    with pytest.raises(InputError, match=r"^dictionary: expected one of pairs .*got WriteTopKSAE"):
        memory.facts(rank_one)
    nowhere = dictionary(*world.dictionary.directions, hook=None)
    with pytest.raises(InputError, match=r"^layer, head: expected both"):
        memory.facts(nowhere)
    with pytest.raises(InputError, match=r"^head: expected 0 to 1 in layer 1, got 5"):
        memory.facts(nowhere, layer=1, head=5)
    assert memory.facts(nowhere, layer=1, head=1, n=1)[0].key.startswith("key ")
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
def test_a_dictionary_of_writes_reads_states_and_says_so(world: World, encoder: str) -> None:
    text = world.texts(4, 1, 7)
    hook = HOOK.replace("state", "write")
    of_writes = dictionary(*(3 * side for side in world.dictionary.directions), hook=hook, encoder=encoder)
    of_writes.cfg.metadata.labels = world.dictionary.cfg.metadata.labels
    with pytest.warns(UserWarning, match="a dictionary of writes reads states"):
        facts = world.model.memory(text).facts(of_writes, n=4)
    assert {(fact.key, fact.value) for fact in facts} == set(world.facts(text[0]))


# ---------------------------------------------------------------------------------------- writing


def test_the_model_answers_what_was_written(world: World) -> None:
    """Another value for one key: the new answer, the answers about all others, and nothing of it for another key."""
    n = 30
    new, others, null = [], [], []
    values = torch.randint(65, 129, (n,), generator=torch.Generator().manual_seed(2)).tolist()
    for text, token in zip(world.texts(4, n, 11), values):
        memory = world.model.memory(text[None])
        before = memory.state(LAYER)
        (key, old), *rest = world.facts(text)
        if (value := world.words[token]) in {old, *(other for _, other in rest)}:
            continue
        changed = memory.with_fact(world.dictionary, key, value, instead_of=old)
        assert changed.edited and not memory.edited and torch.equal(memory.state(LAYER), before)
        assert torch.equal(changed.state(LAYER, 1 - HEAD), memory.state(LAYER, 1 - HEAD))
        new.append(world.answer(changed, key) == value)
        others += [world.answer(changed, other) == right for other, right in rest]
        elsewhere = memory.with_fact(world.dictionary, rest[0][0], value, instead_of=rest[0][1])
        null.append(world.answer(elsewhere, key) == value)
    assert sum(new) >= 0.95 * len(new) and sum(others) >= 0.98 * len(others) and sum(null) <= 0.1 * len(null)


def test_heads_whose_dictionary_lacks_a_word_stay_and_are_named(world: World) -> None:
    """`recall` with a second dictionary, of the other head, that knows no key."""
    text = world.texts(4, 1, 7)
    memory = world.model.memory(text)
    (key, old), *rest = world.facts(text[0])
    value = next(word for word in world.words[65:] if word not in {old, *(other for _, other in rest)})
    partial = dictionary(*world.dictionary.directions, hook=HOOK.replace("heads.1", "heads.0"))
    labels = world.dictionary.cfg.metadata.labels
    partial.cfg.metadata.labels = labels | {"keys": labels["keys"] | {"words": [None] * 64}}
    with pytest.warns(UserWarning, match=rf"lacks a word stay as they are: L1H0 lacks '{key}'$"):
        changed = memory.with_fact([partial, world.dictionary], key, value, instead_of=old)
    alone = memory.with_fact(world.dictionary, key, value, instead_of=old)
    assert torch.equal(changed.state(LAYER), alone.state(LAYER))
    with pytest.raises(InputError, match=r"got others: L1H0 lacks 'Tokio'; nearest: Tokyo.*; L1H1 lacks 'Tokio'"):
        both = [dictionary(*world.dictionary.directions, hook=partial.cfg.metadata.hook_name), world.dictionary]
        both[0].cfg.metadata.labels = labels
        memory.with_fact(both, key, "Tokio", instead_of=old)


def test_a_fact_comes_and_goes(world: World) -> None:
    gone, come, still, others = [], [], [], []
    for text in [*world.texts(4, 20, 12), *world.texts(8, 20, 12)]:
        memory = world.model.memory(text[None])
        (key, value), *rest = world.facts(text)
        without = memory.with_fact([world.dictionary], key, None, instead_of=value)
        gone.append((key, value) not in {(fact.key, fact.value) for fact in without.facts(world.dictionary)})
        still.append(world.answer(without, key) == value)
        others += [world.answer(without, other) == right for other, right in rest]
        again = without.with_fact(world.dictionary, key, value)
        come.append(world.answer(again, key) == value)
    assert sum(gone) == len(gone) and sum(come[:20]) >= 0.95 * 20
    assert sum(still) <= 0.1 * len(still) and sum(others) >= 0.98 * len(others)


def test_a_fact_is_rewritten_in_each_head_that_has_it(world: World) -> None:
    """Several heads of one layer, in any order, of which one holds the fact."""
    other = dictionary(*world.dictionary.directions, hook=HOOK.replace(f"heads.{HEAD}", f"heads.{1 - HEAD}"))
    other.cfg.metadata.labels = world.dictionary.cfg.metadata.labels
    text = world.texts(4, 1, 7)
    memory = world.model.memory(text)
    (key, old), (_, new), *_ = world.facts(text[0])
    for order in ([world.dictionary, other], [other, world.dictionary]):
        memory.with_fact(order, key, None, instead_of=old)
        for head, own in enumerate((other, world.dictionary)):
            states = [memory.with_fact(heads, key, new).state(LAYER, head) for heads in (order, own)]
            assert torch.equal(*states)


def test_signs_of_atoms_do_not_matter(world: World) -> None:
    """A pair has one sign, which either atom may carry: sizes are those of positive pairs, and what is written is the
    same."""
    g = torch.Generator().manual_seed(4)
    sides = world.dictionary.directions
    flips = [torch.randint(2, (len(side), 1), generator=g) * 2 - 1 for side in sides]
    turned = dictionary(*(side * flip for side, flip in zip(sides, flips)))
    tokens = world.texts(4, 1000, 1)
    words = [[world.words[token] for token in text] for text in tokens.tolist()]
    label_atoms(turned, world.states(tokens), words)
    for side in ("keys", "values"):
        sizes, plain = (torch.tensor(each.cfg.metadata.labels[side]["sizes"]) for each in (turned, world.dictionary))
        torch.testing.assert_close(sizes.abs(), plain.abs())
    (key, old), *rest = world.facts(tokens[0])
    value = next(word for word in world.words[65:] if word not in {old, *(other for _, other in rest)})
    memory = world.model.memory(tokens[:1])
    changed, plain = (
        memory.with_fact(pairs, key, value, instead_of=old).state(LAYER) for pairs in (turned, world.dictionary)
    )
    torch.testing.assert_close(changed, plain)


def test_what_cannot_be_written_says_why(world: World) -> None:
    text = world.texts(4, 1, 7)
    memory = world.model.memory(text)
    (key, value), (other, _), *_ = world.facts(text[0])
    with pytest.raises(
        InputError, match=r"^expected words that name atoms, got others: L1H1 .*'Tokio'; nearest: Tokyo"
    ):
        memory.with_fact(world.dictionary, key, "Tokio", instead_of=value)
    with pytest.raises(InputError, match=rf"^instead_of: expected a value that '{other}' has here, got '{value}'"):
        memory.with_fact(world.dictionary, other, None, instead_of=value)
    with pytest.raises(InputError, match=r"^value: expected a word, or instead_of"):
        memory.with_fact(world.dictionary, key, None)


# ---------------------------------------------------------------------------------------- the dictionary that ships


def states_of_facts(pairs: int, count: int, seed: int) -> tuple[HookedRecurrent, Tensor, list[dict[str, str]]]:
    """The model `facts`, tokens of texts [N,1 + 5 pairs], and what they tell."""
    model = HookedRecurrent.from_pretrained("facts")
    batch = Facts().batch(count, torch.Generator().manual_seed(seed), pairs=pairs)
    return model, batch.tokens[:, : 1 + 5 * pairs], Facts().told(batch.symbols)


@pytest.mark.parametrize(("pairs", "least"), [(2, 0.99), (16, 0.97), (24, 0.9), (32, 0.8)])
def test_facts_are_counted_by_what_their_pairs_usually_are(pairs: int, least: float) -> None:
    """Not by their share of the state, which is the smaller the more facts it holds."""
    model, tokens, told = states_of_facts(pairs, 40, seed=pairs)
    sae: Any = load_sae(zoo.path("facts") / "pairs")
    found = read_memory(model.recurrence(tokens, 0).final_state()[:, 0], sae)
    read = [{(fact.key, fact.value) for fact in facts} for facts in found]
    hits = sum(len(own & facts.items()) for own, facts in zip(read, told))
    assert hits >= least * 40 * pairs and hits >= 0.97 * sum(map(len, read))


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


@pytest.mark.parametrize("pairs", [4, 8])
def test_the_shipped_dictionary_reads_english_facts_from_states(pairs: int) -> None:
    model, tokens, told = states_of_facts(pairs, 200, seed=pairs)
    sae = load_sae(zoo.path("facts") / "pairs")
    states = model.recurrence(tokens, 0).final_state()[:, 0]
    right = [set(facts.items()) for facts in told]
    for n, least in ((pairs, 0.98), (None, 0.95)):
        read = [{(fact.key, fact.value) for fact in facts} for facts in read_memory(states, sae, n)]
        hits = sum(len(a & b) for a, b in zip(right, read))
        assert hits >= 0.98 * 200 * pairs and hits >= least * sum(map(len, read))
        assert sum(len(a & b) for a, b in zip(right, read[1:] + read[:1])) <= 0.1 * 200 * pairs


def test_a_replaced_english_fact_is_answered_and_others_stay() -> None:
    model, tokens, told = states_of_facts(4, 20, seed=5)
    sae = load_sae(zoo.path("facts") / "pairs")
    values = {value for facts in told for value in facts.values()}
    new, others = [], []
    for text, facts in zip(tokens, told):
        key, old = next(iter(facts.items()))
        verb = key.partition(" ")[2]
        options = sorted(value for value in values if value != old and value in dict(RELATIONS)[verb])
        memory = model.memory(text[None]).with_fact(sae, key, options[0], instead_of=old)
        answers = {
            asked: model.generate(asked, memory=memory, max_new_tokens=1, do_sample=False).split()[-1]
            for asked in facts
        }
        new.append(answers.pop(key) == options[0])
        others += [answer == facts[asked] for asked, answer in answers.items()]
    assert sum(new) >= 0.95 * len(new) and sum(others) >= 0.98 * len(others)
