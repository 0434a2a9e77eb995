"""What the models of the zoo do: sequences whose answers are known, and the symbols that they are made of.

A task spells symbols as tokens. Another value at a place is the same symbols with that one changed, spelled again:

    >>> import torch
    >>> from hookpoints.zoo.tasks import Recall
    >>> task = Recall()
    >>> batch = task.batch(2, torch.Generator().manual_seed(0), pairs=4)
    >>> batch.tokens.shape, batch.answers.shape
    (torch.Size([2, 11]), torch.Size([2, 1]))
    >>> changed = task.spell(batch.symbols | {"values": task.others(batch.symbols["values"], torch.Generator())})
    >>> bool((changed.answers != batch.answers).all())
    True
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, product

import torch
from torch import Generator, Tensor

PEOPLE = (
    "Ada Ben Cleo Dan Eve Finn Gus Hana Ian Jane Kim Leo Mia Ned Olga Pam Quinn Rosa Sam Tara Uma Vera Will Xena Yara "
    "Zoe Alma Boris Clara David Elsa Frank Grace Hugo Iris Jack Karl Lena Max Nora Oscar Paula Ralph Sara Tom Ursula "
    "Victor Wanda Anna Bruno Carla Dora Emil Flora Greta Henry Ivan Julia Kurt Lucy Marie Nils Otto Peter"
)
"""Words for keys."""
CITIES = (
    "Paris Rome Oslo Cairo Tokyo Delhi Lima Quito Seoul Madrid Berlin Vienna Prague Warsaw Athens Dublin London "
    "Lisbon Zurich Geneva Milan Naples Venice Turin Porto Seville Lyon Nice Ghent Bruges Hamburg Munich Bonn Cologne "
    "Moscow Kiev Minsk Riga Tallinn Vilnius Helsinki Bergen Malmo Aarhus Boston Denver Dallas Houston Miami Austin "
    "Phoenix Seattle Chicago Toronto Montreal Havana Bogota Caracas Santiago Nairobi Lagos Dakar Tunis Algiers"
)
"""Words for values."""
ATTRIBUTES = (
    "red blue green black white gold gray pink",
    "oak iron glass stone silk clay brass wool",
    "cup key box ring lamp boat drum coat",
)
"""Words for the attributes of a value, by slot: color, material, thing."""
TRADES = "baker sailor miller doctor painter farmer tailor singer writer barber weaver hunter pilot nurse judge mason"
PETS = "cat dog horse goat parrot rabbit turtle pony snake canary ferret hamster"
COLORS = "red green blue black white brown gray golden"
RELATIONS = (
    ("lives in", CITIES.split()[:32]),
    ("is a", TRADES.split()),
    ("keeps a", PETS.split()),
    ("dresses in", COLORS.split()),
)
"""What a fact says about a name, with the values that it can have: home, trade, pet, color."""


@dataclass(frozen=True)
class Batch:
    """Sequences of a task. Q: questions, P: symbols of a kind."""

    tokens: Tensor
    """[B,T] token ids; the answers are in it, each right after its position."""
    positions: Tensor
    """[B,Q] positions whose next token is an answer."""
    answers: Tensor
    """[B,Q] token ids."""
    symbols: Mapping[str, Tensor]
    """What was spelled: the symbols of each kind, [B,P] ("keys", "values"), and what a question asks for, [B,Q]
    ("asked": an index into P)."""
    places: Mapping[str, Tensor]
    """[B,P] position of each symbol of the kinds that sequences are made of."""


@dataclass(frozen=True)
class Recall:
    """Pairs of a key and a value, then keys: ``<bos> Ada Paris Ben Rome ... Ada`` asks for ``Paris``. Keys do not
    repeat."""

    n_keys: int = 64
    n_values: int = 64
    sizes: tuple[Mapping[str, int], ...] = tuple({"pairs": pairs} for pairs in range(4, 17))

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """``<bos>``, names for the keys, cities for the values."""
        return ("<bos>", *PEOPLE.split()[: self.n_keys], *CITIES.split()[: self.n_values])

    def batch(self, n: int, generator: Generator, pairs: int = 8, queries: int = 1) -> Batch:
        """n fresh sequences of 1 + 2 (pairs + queries) tokens. Symbols: keys, values [B,P]; asked [B,Q]."""
        return self.spell(_drawn_pairs(n, generator, (self.n_keys, self.n_values), pairs, queries))

    def spell(self, symbols: Mapping[str, Tensor]) -> Batch:
        """The sequences that keys, values [B,P] and asked [B,Q] spell."""
        keys = 1 + symbols["keys"]
        values = 1 + self.n_keys + symbols["values"]
        answers = values.gather(1, symbols["asked"])
        return _spelled_pairs(symbols, keys, values, [keys.gather(1, symbols["asked"])], answers)

    def others(self, values: Tensor, generator: Generator) -> Tensor:
        """For each value another one."""
        return (values + torch.randint(1, self.n_values, values.shape, generator=generator)) % self.n_values


@dataclass(frozen=True)
class Composition:
    """Pairs of a key and a token that stands for three attributes, then keys with the slot that is asked for:
    ``<bos> Ada red-oak-cup Ben gold-silk-box ... Ada material?`` asks for ``oak``."""

    n_keys: int = 32
    n_attributes: int = 8
    """Attributes of a slot; three slots make 8 x 8 x 8 tokens."""
    sizes: tuple[Mapping[str, int], ...] = tuple({"pairs": pairs} for pairs in range(2, 9))

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """``<bos>``, names, ``red-oak-cup`` and so on, ``color?``, ``material?``, ``thing?``, and the attributes."""
        slots = [words.split() for words in ATTRIBUTES]
        names = PEOPLE.split()[: self.n_keys]
        tokens = map("-".join, product(*slots))
        return ("<bos>", *names, *tokens, "color?", "material?", "thing?", *chain(*slots))

    def batch(self, n: int, generator: Generator, pairs: int = 5, queries: int = 1) -> Batch:
        """n fresh sequences of 1 + 2 pairs + 3 queries tokens. Symbols: keys, values [B,P]; asked, slots [B,Q]."""
        drawn = _drawn_pairs(n, generator, (self.n_keys, self.n_attributes**3), pairs, queries)
        return self.spell(drawn | {"slots": torch.randint(3, (n, queries), generator=generator)})

    def spell(self, symbols: Mapping[str, Tensor]) -> Batch:
        """The sequences that keys, values [B,P], asked and slots [B,Q] spell."""
        asked = symbols["asked"]
        slots = symbols["slots"]
        first_slot = 1 + self.n_keys + self.n_attributes**3
        keys = 1 + symbols["keys"]
        values = 1 + self.n_keys + symbols["values"]
        attributes = self.attributes(symbols["values"].gather(1, asked)).gather(2, slots[..., None])[..., 0]
        answers = first_slot + 3 + slots * self.n_attributes + attributes
        return _spelled_pairs(symbols, keys, values, [keys.gather(1, asked), first_slot + slots], answers)

    def attributes(self, values: Tensor) -> Tensor:
        """Attributes [...,3] of values [...]."""
        return torch.stack([values // self.n_attributes**power % self.n_attributes for power in (2, 1, 0)], dim=-1)

    def others(self, values: Tensor, generator: Generator) -> Tensor:
        """For each value one that differs from it in all three attributes."""
        old = self.attributes(values)
        new = (old + torch.randint(1, self.n_attributes, old.shape, generator=generator)) % self.n_attributes
        return new @ torch.tensor([self.n_attributes**2, self.n_attributes, 1])


class Facts:
    """Facts about names, each told once in a sentence, then some of them again: ``<bos> Ben lives in Rome . Ada keeps a
    parrot . ... Ben lives in`` asks for ``Rome``. A key is a name and one of four relations: home, trade, pet, color. A
    name has half as many facts as it can have, in the mean, and none of them twice."""

    n_names = 36
    n_keys = 4 * n_names
    n_values = sum(len(values) for _, values in RELATIONS)
    sizes: tuple[Mapping[str, int], ...] = tuple({"pairs": pairs} for pairs in range(2, 11))
    _words = ("lives", "is", "keeps", "dresses", "in", "a")
    _counts = torch.tensor([len(values) for _, values in RELATIONS])
    """Values of each relation."""
    _firsts = _counts.cumsum(0) - _counts
    """The first value of each relation."""

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """``<bos>``, ``.``, the words of the relations, 36 names, 68 values by relation."""
        values = chain.from_iterable(values for _, values in RELATIONS)
        return ("<bos>", ".", *self._words, *PEOPLE.split()[: self.n_names], *values)

    def batch(self, n: int, generator: Generator, pairs: int = 4, queries: int = 1) -> Batch:
        """n fresh sequences of 1 + 5 (pairs + queries) tokens. Symbols: keys (4 name + relation), values [B,P]; asked
        [B,Q]. The keys are about half as many names as pairs, at least two."""
        n_told = max(2, (pairs + 1) // 2)
        names = torch.rand(n, self.n_names, generator=generator).argsort(dim=1)[:, :n_told]
        chosen = torch.rand(n, 4 * n_told, generator=generator).argsort(dim=1)[:, :pairs]
        keys = 4 * names.gather(1, chosen // 4) + chosen % 4
        count = self._counts[keys % 4]
        values = self._firsts[keys % 4] + (torch.rand(n, pairs, generator=generator) * count).long()
        asked = torch.randint(pairs, (n, queries), generator=generator)
        return self.spell({"keys": keys, "values": values, "asked": asked})

    def spell(self, symbols: Mapping[str, Tensor]) -> Batch:
        """The sequences that keys, values [B,P] and asked [B,Q] spell. The place of a key is that of its name."""
        vocabulary = self.vocabulary
        words = torch.tensor([[vocabulary.index(word) for word in form.split()] for form, _ in RELATIONS])
        asked = symbols["asked"]
        keys, values = (
            torch.cat([symbols[kind], symbols[kind].gather(1, asked)], dim=1) for kind in ("keys", "values")
        )
        names = 2 + len(self._words) + keys // 4
        answers = 2 + len(self._words) + self.n_names + values
        verb, article = words[keys % 4].unbind(dim=-1)
        sentences = torch.stack([names, verb, article, answers, torch.ones_like(names)], dim=-1).flatten(1)
        told = symbols["keys"].shape[1]
        first = 1 + 5 * torch.arange(told).expand(len(keys), told)
        positions = 3 + 5 * torch.arange(told, keys.shape[1]).expand_as(asked)
        tokens = torch.cat([torch.zeros_like(sentences[:, :1]), sentences], dim=1)
        return Batch(tokens, positions, answers[:, told:], symbols, {"keys": first, "values": first + 3})

    def others(self, values: Tensor, generator: Generator) -> Tensor:
        """For each value another one of its relation."""
        relation = torch.bucketize(values, self._firsts, right=True) - 1
        count = self._counts[relation]
        first = self._firsts[relation]
        step = 1 + (torch.rand(values.shape, generator=generator) * (count - 1)).long()
        return first + (values - first + step) % count

    def strangers(self, keys: Tensor, asked: Tensor, generator: Generator) -> Tensor:
        """For the keys [B,Q] that are asked for, of keys [B,P], the same relation of a name that no key has."""
        score = torch.rand(len(keys), self.n_names, generator=generator).scatter(1, keys // 4, -1.0)
        return 4 * score.argmax(dim=1, keepdim=True) + keys.gather(1, asked) % 4


def _drawn_pairs(n: int, generator: Generator, counts: tuple[int, int], pairs: int, queries: int) -> dict[str, Tensor]:
    """Keys without repetition and values [B,P], and the pairs that are asked for [B,Q]; counts: of keys, of values."""
    return {
        "keys": torch.rand(n, counts[0], generator=generator).argsort(dim=1)[:, :pairs],
        "values": torch.randint(counts[1], (n, pairs), generator=generator),
        "asked": torch.randint(pairs, (n, queries), generator=generator),
    }


def _spelled_pairs(
    symbols: Mapping[str, Tensor], keys: Tensor, values: Tensor, question: list[Tensor], answers: Tensor
) -> Batch:
    """Token ids of pairs [B,P], then of questions and answers [B,Q]."""
    pairs = torch.stack([keys, values], dim=-1)
    asked = torch.stack([*question, answers], dim=-1)
    tokens = torch.cat([keys.new_zeros(len(keys), 1), pairs.flatten(1), asked.flatten(1)], dim=1)
    first = 1 + 2 * torch.arange(keys.shape[1]).expand_as(keys)
    positions = 2 * keys.shape[1] + len(question) + asked.shape[2] * torch.arange(asked.shape[1])
    return Batch(tokens, positions.expand_as(answers), answers, symbols, {"keys": first, "values": first + 1})
