"""Facts told in running speech: read by a reader of memories, and contradicted by a lie."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from random import Random
from typing import Any

import frame
import torch
from frame import Line

from hookpoints import HookedRecurrent, Memory, MemoryReader
from hookpoints.zoo import english

TITLE = "Facts in running speech"
QUICK = {"texts": 2, "models": ("facts-english",), "sizes": (2,), "names": 4}
MODELS = ("facts-english", "facts-english-rwkv7", "facts-english-mamba2")
SIZES = (2, 4, 8)
SPACE = {2: 96, 4: 160, 8: 256}
"""Tokens in which so many facts are told."""
CASES = ("clean", "lie later", "lie earlier", "lie twice")
"""No lie; a lie that is read after all facts; before all; and after all, in two wordings."""
PEACE = " The past year was one of peace and of prosperity."


def documents_of(size: int, n: int, seed: int) -> list[english.Document]:
    """Of facts that training never had, all told within `SPACE`."""
    drawn = english.draw(12 * n, facts=size, questions=0, seed=seed)
    whole = [one for one in drawn if len(one.facts) == size and one.facts[-1].stop <= SPACE[size]]
    assert len(whole) >= n, (size, len(whole))
    return whole[:n]


def possible_facts(names: set[str]) -> dict[str, tuple[str, str, str]]:
    """Every sentence that can be told of names, and its name, relation and value."""
    return {
        " " + wording.format(n=name, v=value): (name, relation, value)
        for name in sorted(names)
        for relation, each in english.RELATIONS.items()
        for value in each.values
        for wording in each.told
    }


def told_in(document: english.Document) -> set[tuple[str, str, str]]:
    return {(fact.name, fact.relation, fact.value) for fact in document.facts}


def read_facts(
    model: HookedRecurrent, reader: MemoryReader, size: int, texts: Sequence[english.Document], names: int
) -> dict[str, float]:
    """The share of the facts that are among as many picked ones, by a reader that is given all possible sentences: of
    the text, of another text, and where scores rank them."""
    possible = possible_facts({*english.NAMES[:names], *(fact.name for text in texts for fact in text.facts)})
    sentences = list(possible)
    facts = list(possible.values())
    counts = {"read": 0, "ranked": 0, "another text": 0}
    memory = model.memory(torch.tensor([text.tokens[: SPACE[size]] for text in texts]))
    for row, scores in enumerate(reader.scores(memory, sentences)):
        order = scores.argsort(descending=True).tolist()
        likely = [sentences[place] for place in order[: 160 * size]]
        # Several wordings of one fact may be picked.
        readings = reader.pick(memory, likely, 2 * size, row=row)
        picked = [*dict.fromkeys(possible[reading.text] for reading in readings)][:size]
        ranked = [*dict.fromkeys(facts[place] for place in order)][:size]
        counts["read"] += len(told_in(texts[row]) & {*picked})
        counts["ranked"] += len(told_in(texts[row]) & {*ranked})
        counts["another text"] += len(told_in(texts[(row + 1) % len(texts)]) & {*picked})
    return {name: count / (size * len(texts)) for name, count in counts.items()}


def question(fact: english.ToldFact) -> str:
    return " " + english.RELATIONS[fact.relation].asked[0].format(n=fact.name, v="\0").split("\0")[0].rstrip()


def answer(model: HookedRecurrent, memory: Memory, fact: english.ToldFact) -> str:
    logits = model.logits_after(memory, question(fact))
    return str(model.to_string(int(logits[0, -1].argmax()))).strip()


def another_value(fact: english.ToldFact, document: english.Document, rng: Random) -> str:
    """One that the document tells of nobody."""
    told = {each.value for each in document.facts}
    return rng.choice([value for value in english.RELATIONS[fact.relation].values if value not in told])


def contradicted(model: HookedRecurrent, texts: Sequence[english.Document]) -> dict[str, dict[str, float]]:
    """What `suspects` says of a fact and a lie, a sentence that contradicts it. The sentence whose answer the model
    gives: is it flagged, is it first, is it `overwrote` where it was read later and nowhere else, does the model give
    the other answer without it? And are others flagged? Texts in which the model gives neither are left out."""
    rng = Random(2)
    shares: dict[str, dict[str, list[bool]]] = {case: {} for case in CASES}
    for document in texts:
        fact = rng.choice(document.facts)
        other = another_value(fact, document, rng)
        told = [" " + wording.format(n=fact.name, v=other) for wording in english.RELATIONS[fact.relation].told]
        first, second = (f"{sentence}{PEACE}" for sentence in rng.sample(told, 2))
        tokens = torch.tensor([document.tokens[: document.facts[-1].stop]])
        begin, rest = tokens.tensor_split([int(tokens[0, 0] == model.tokenizer.bos_token_id)], 1)
        memory = model.memory(tokens)
        cases = {
            "clean": memory,
            "lie later": model.memory(first, memory=memory),
            "lie earlier": model.memory(torch.cat([begin, model.to_tokens(first, prepend_bos=False), rest], 1)),
            "lie twice": model.memory(first + second, memory=memory),
        }
        for case, each in cases.items():
            suspects = each.suspects(question(fact))
            given = answer(model, each, fact)
            if case != "clean" and given not in (other, fact.value):
                continue  # the model gives neither
            own = [one for one in suspects if case != "clean" and fact.name in one.text and given in one.text]
            figures = {"others flagged": any(one.flagged for one in suspects if one not in own)}
            if own:
                is_later = (given == other) == (case != "lie earlier")
                rival = fact.value if given == other else other
                figures["flagged"] = any(one.flagged for one in own)
                figures["first"] = suspects[0] in own
                figures["order"] = all(one.overwrote == is_later for one in own if one.flagged)
                figures["other answer"] = any(one.answer.strip() == rival for one in own)
            for what, is_so in figures.items():
                shares[case].setdefault(what, []).append(is_so)
    return {
        case: {what: statistics.mean(each) for what, each in own.items()} | {"texts": len(own["others flagged"])}
        for case, own in shares.items()
    }


def of_model(name: str, texts: int, sizes: Sequence[int], names: int) -> dict[str, Any]:
    model = HookedRecurrent.from_pretrained(name, device="cpu")
    training = english.draw(160, facts=6, questions=0, seed=5, split="train")
    reader = MemoryReader.fit(model, torch.tensor([document.tokens for document in training]), context=192)
    figures: dict[str, Any] = {}
    for size in sizes:
        documents = documents_of(size, texts, 99 + size)
        figures[f"{size} facts"] = read_facts(model, reader, size, documents, names)
    return figures | {"contradicted": contradicted(model, documents_of(min(4, max(sizes)), texts, 19))}


def measure(
    texts: int = 30,
    models: tuple[str, ...] = MODELS,
    sizes: tuple[int, ...] = SIZES,
    names: int = len(english.NAMES),
) -> dict[str, Any]:
    """Every model, with facts that its training never had, between speeches that it never had."""
    return {name: of_model(name, texts, sizes, names) for name in models}


GOALS = {"2 facts": 0.95, "4 facts": 0.95, "8 facts": 0.9}
FLAGGED: dict[str, dict[str, Any]] = {
    "flagged": {"goal": 0.95, "least": True},
    "first": {"goal": 0.95, "least": True},
    "order": {"goal": 1, "least": True},
    "other answer": {},
    "others flagged": {"goal": 0.05},
}
"""What is said of the sentence of the answer, and its goal."""


def lines(figures: dict[str, Any]) -> list[Line]:
    """Readers, and contradictions."""
    rows: list[Line] = []
    for name, own in figures.items():
        for size, goal in GOALS.items():
            if size not in own:
                continue
            rows.append(Line(f"{size} among all that could be told, picked", own[size]["read"], "", goal, True, name))
            rows.append(Line(f"{size}, ranked by score", own[size]["ranked"], column=name))
            rows.append(Line(f"{size}, of another text", own[size]["another text"], column=name))
        for case, shares in own["contradicted"].items():
            rows += [
                Line(f"{case}: {what}", shares[what], column=name, **goal)
                for what, goal in FLAGGED.items()
                if what in shares
            ]
    return rows


if __name__ == "__main__":
    frame.main(sys.modules[__name__])
