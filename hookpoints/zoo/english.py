"""Speeches in which facts are told and asked: texts for the models `facts-english`, with all that is known of them.

    >>> from hookpoints.zoo import english
    >>> document = english.draw(1, facts=4, questions=2)[0]
    >>> len(document.tokens), len(document.facts), len(document.questions)
    (384, 4, 2)
    >>> fact = document.facts[0]
    >>> document.tokens[fact.place] == fact.answer
    True

A fact gives a name one of four relations: home, trade, pet or color. It is told in one of several wordings, and asked
for by a question or by a wording. Training never had: a quarter of the combinations of name, relation and value; one
relation of each of eight names; the names `STRANGERS`, but in speeches; the wordings `Relation.held_out`; and the
sentences between the facts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from hookpoints import embedded
from hookpoints.zoo.tasks import CITIES, COLORS, PEOPLE, PETS, TRADES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MODELS = ("facts-english", "facts-english-rwkv7", "facts-english-mamba2", "facts-english-kda")
"""Models of these texts, with one tokenizer. `zoo.names()` has those that ship."""
SIZES = (2, 4, 8, 12)
"""Facts of the documents that `zoo.accuracy` measures."""
Split = Literal["train", "test"]
Wordings = Literal["told", "held_out"]


@dataclass(frozen=True)
class Relation:
    """What a fact can say about a name. A wording has {n} for the name and {v} for the value."""

    values: tuple[str, ...]
    told: tuple[str, ...]
    """Wordings of the fact."""
    held_out: tuple[str, ...]
    """Wordings of the fact that training never had."""
    asked: tuple[str, ...]
    """Questions. A wording of the fact asks for the value too."""


NAMES = tuple(PEOPLE.split()[:36])
"""Names in the facts of training."""
STRANGERS = ("John", "George", "James", "Thomas")
"""Names that training had in speeches only."""
RELATIONS = {
    "home": Relation(
        tuple(CITIES.split()[:32]),
        (
            "{n} lives in {v}.",
            "{n} resides in {v}.",
            "The home of {n} is {v}.",
            "The city where {n} lives is {v}.",
            "At present {n} resides in {v}.",
        ),
        ("The house of {n} is in {v}.", "The place where {n} lives is {v}."),
        ("Where does {n} live? {v}.", "What is the home of {n}? {v}."),
    ),
    "trade": Relation(
        tuple(TRADES.split()),
        (
            "{n} is a {v}.",
            "{n} became a {v}.",
            "By trade {n} is a {v}.",
            "For years {n} was a {v}.",
            "The trade that {n} has: {v}.",
        ),
        ("At work {n} is a {v}.", "In the end {n} became a {v}."),
        ("What is the trade of {n}? {v}.", "What did {n} become? {v}."),
    ),
    "pet": Relation(
        tuple(PETS.split()),
        (
            "{n} keeps a {v}.",
            "{n} has a {v}.",
            "{n} owns a {v}.",
            "The pet of {n} is a {v}.",
            "At home {n} keeps a {v}.",
        ),
        ("For years {n} had a {v}.", "The animal of {n} is a {v}."),
        ("What does {n} keep? {v}.", "What is the pet of {n}? {v}."),
    ),
    "color": Relation(
        tuple(COLORS.split()),
        (
            "{n} dresses in {v}.",
            "{n} wears {v}.",
            "The color of {n} is {v}.",
            "The color that {n} wears is {v}.",
            "On Sundays {n} wears {v}.",
        ),
        ("The dress of {n} is {v}.", "In public {n} dresses in {v}."),
        ("What does {n} wear? {v}.", "What is the color of {n}? {v}."),
    ),
}
"""In all wordings of training the name stands two or three words before the value."""


def never_told(name: str, relation: str) -> bool:
    """Whether training had no fact of a name and a relation: so for one relation of each of the last eight names, and
    for `STRANGERS`."""
    if name in STRANGERS:
        return True
    place = NAMES.index(name)
    return place >= len(NAMES) - 8 and place % 4 == list(RELATIONS).index(relation)


def held_out(name: str, relation: str, value: str) -> bool:
    """Whether training never had a fact: those that are `never_told`, and of the others every fourth value."""
    return never_told(name, relation) or (NAMES.index(name) + RELATIONS[relation].values.index(value)) % 4 == 0


def _split_values(name: str, relation: str, split: Split) -> list[str]:
    """Values that a split has for a name and a relation."""
    values = RELATIONS[relation].values
    return [value for value in values if held_out(name, relation, value) == (split == "test")]


def told() -> dict[str, object]:
    """What texts can tell and what training never had, as in truth.json."""
    names = (*NAMES, *STRANGERS)
    return {
        "names": NAMES,
        "strangers": STRANGERS,
        "relations": {relation: asdict(each) for relation, each in RELATIONS.items()},
        "held_out": {
            name: {relation: _split_values(name, relation, "test") for relation in RELATIONS} for name in names
        },
    }


def values() -> list[str]:
    """Values of all relations."""
    return [value for each in RELATIONS.values() for value in each.values]


def sentences(text: str) -> list[str]:
    """Sentences of a text that end with a period, of 20 to 250 characters, in their order."""
    parts = (part.strip() for line in text.split("\n") for part in re.split(r"(?<=[a-z)]\.) (?=[A-Z])", line))
    return [part for part in parts if 20 <= len(part) <= 250 and part[0].isupper() and part.endswith(".")]


@dataclass(frozen=True)
class ToldFact:
    """A fact and where it is told."""

    name: str
    relation: str
    value: str
    sentence: str
    answer: int
    """Token id of the value."""
    start: int
    stop: int
    """Tokens of the sentence: ``start <= token < stop``."""
    place: int
    """Token of the value."""


@dataclass(frozen=True)
class Question:
    """A question about a fact of the document, which stands in it with its answer."""

    fact: ToldFact
    sentence: str
    position: int
    """Token before the answer: its prediction is the model's answer."""


@dataclass(frozen=True)
class Document:
    """Token ids, the facts that they tell, and the questions in them."""

    tokens: Sequence[int]
    facts: Sequence[ToldFact]
    questions: Sequence[Question]


class Writer:
    """Writes documents of a split.

    Args:
        tokenizer: of the models, where each name, value and word of the wordings of training is one token.
        fillers: sentences to put between the facts, in their order.
        split: "test" has facts that are held out, and "train" has the others.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, fillers: Sequence[str], split: Split) -> None:
        spelled = tokenizer([f" {each}" for each in fillers], add_special_tokens=False)["input_ids"]
        self.bos = cast(int, tokenizer.bos_token_id)
        self.split: Split = split
        self.fillers = [ids for ids in spelled if len(ids) <= 60]
        self._tokenizer = tokenizer
        self._spelled: dict[str, list[int]] = {}

    def document(
        self,
        rng: Random,
        facts: int,
        questions: int,
        *,
        length: int = 384,
        fillers: float = 0.7,
        same: float = 0.0,
        interleaved: float = 0.0,
        wordings: Wordings = "told",
        names: Sequence[str] = NAMES,
    ) -> Document:
        """A document of ``length`` tokens, which begins with <|endoftext|> and ends with speech.

        Args:
            rng: the source of all choices.
            facts: how many are told.
            questions: how many are asked, each about another fact as long as there is one.
            length: tokens. Facts and questions behind are left out.
            fillers: probability of a sentence of speech before each fact and question.
            same: probability that all facts have one relation or two, and no name twice. Otherwise there are
                half as many names as facts.
            interleaved: probability that a fact is followed by a question about one that is told already. Half of the
                questions, or more, stand behind the facts.
            wordings: of the facts: "told" are those of training, "held_out" the others. Questions are those of
                training.
            names: to choose from.
        """
        tokens = [self.bos]
        told = list[ToldFact]()
        asked = list[Question]()
        filler = rng.randrange(len(self.fillers))

        def fill(probability: float) -> None:
            nonlocal filler
            if rng.random() < probability:
                filler = (filler + 1) % len(self.fillers)
                tokens.extend(self.fillers[filler])

        def write(sentence: str, answer: int) -> int:
            """Where the answer stands: at its last occurrence in the sentence."""
            fill(fillers)
            ids = self.ids(sentence)
            tokens.extend(ids)
            return len(tokens) - 1 - ids[::-1].index(answer)

        def ask(fact: ToldFact) -> None:
            relation = RELATIONS[fact.relation]
            sentence = rng.choice(rng.choice((relation.told, relation.asked))).format(n=fact.name, v=fact.value)
            asked.append(Question(fact, sentence, write(sentence, fact.answer) - 1))

        for name, relation in self._chosen_keys(rng, facts, same, names):
            value = rng.choice(_split_values(name, relation, self.split))
            sentence = rng.choice(getattr(RELATIONS[relation], wordings)).format(n=name, v=value)
            (answer,) = self.ids(value)
            place = write(sentence, answer)
            start = len(tokens) - len(self.ids(sentence))
            told.append(ToldFact(name, relation, value, sentence, answer, start, len(tokens), place))
            if len(asked) < questions // 2 and rng.random() < interleaved:
                ask(rng.choice(told))
        order = rng.sample(told, len(told))
        for number in range(questions - len(asked)):
            ask(order[number % len(order)])
        while len(tokens) < length:
            fill(1.0)
        return Document(
            tokens[:length],
            [fact for fact in told if fact.stop <= length],
            [question for question in asked if question.position + 1 < length],
        )

    def ids(self, sentence: str) -> list[int]:
        """Token ids of a sentence that follows another one."""
        if sentence not in self._spelled:
            self._spelled[sentence] = self._tokenizer.encode(f" {sentence}", add_special_tokens=False)
        return self._spelled[sentence]

    def _chosen_keys(self, rng: Random, facts: int, same: float, names: Sequence[str]) -> list[tuple[str, str]]:
        """Name and relation of each fact."""
        if rng.random() < same:
            few = rng.sample(list(RELATIONS), 1 if rng.random() < 0.6 else 2)
            keys = [(name, rng.choice(few)) for name in rng.sample(names, len(names))]
        else:
            keys = list(product(rng.sample(names, max(2, (facts + 1) // 2)), RELATIONS))
            rng.shuffle(keys)
        return [key for key in keys if _split_values(*key, self.split)][:facts]


@cache
def writer(split: Split = "test") -> Writer:
    """The writer for the models that ship. Between the facts stand sentences of ``embedded.text(split)``, which
    training never had."""
    from transformers import AutoTokenizer  # takes seconds

    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parent / MODELS[0])
    return Writer(tokenizer, sentences(embedded.text(split)), split)


def draw(
    n: int, facts: int = 8, questions: int = 4, *, seed: int = 0, split: Split = "test", **options: Any
) -> list[Document]:
    """n documents of a split, by seed. Further options are those of `Writer.document`.

    Between the facts stand sentences that training never had, in both splits: of ``embedded.text(split)``.
    """
    rng = Random(seed)
    return [writer(split).document(rng, facts, questions, **options) for _ in range(n)]


@torch.no_grad()
def answered(model: Callable[[Tensor], Tensor], documents: Sequence[Document]) -> list[tuple[ToldFact, bool]]:
    """The fact that each question of documents of one length asks for, and whether the model's answer is right.

    The model is called with token ids [B,T], eight documents at once, and returns logits [B,T,vocab].
    """
    parts = torch.tensor([document.tokens for document in documents]).split(8)
    said = torch.cat([model(part).argmax(dim=-1).cpu() for part in parts]).tolist()
    asked = ((each, row[each.position]) for document, row in zip(documents, said) for each in document.questions)
    return [(question.fact, answer == question.fact.answer) for question, answer in asked]
