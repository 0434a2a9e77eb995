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
        return self.spell(_drawn(n, generator, (self.n_keys, self.n_values), pairs, queries))

    def spell(self, symbols: Mapping[str, Tensor]) -> Batch:
        """The sequences that keys, values [B,P] and asked [B,Q] spell."""
        keys = 1 + symbols["keys"]
        values = 1 + self.n_keys + symbols["values"]
        answers = values.gather(1, symbols["asked"])
        return _spelled(symbols, keys, values, [keys.gather(1, symbols["asked"])], answers)

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
        drawn = _drawn(n, generator, (self.n_keys, self.n_attributes**3), pairs, queries)
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
        return _spelled(symbols, keys, values, [keys.gather(1, asked), first_slot + slots], answers)

    def attributes(self, values: Tensor) -> Tensor:
        """Attributes [...,3] of values [...]."""
        return torch.stack([values // self.n_attributes**power % self.n_attributes for power in (2, 1, 0)], dim=-1)

    def others(self, values: Tensor, generator: Generator) -> Tensor:
        """For each value one that differs from it in all three attributes."""
        old = self.attributes(values)
        new = (old + torch.randint(1, self.n_attributes, old.shape, generator=generator)) % self.n_attributes
        return new @ torch.tensor([self.n_attributes**2, self.n_attributes, 1])


def _drawn(n: int, generator: Generator, counts: tuple[int, int], pairs: int, queries: int) -> dict[str, Tensor]:
    """Keys without repetition and values [B,P], and the pairs that are asked for [B,Q]; counts: of keys, of values."""
    return {
        "keys": torch.rand(n, counts[0], generator=generator).argsort(dim=1)[:, :pairs],
        "values": torch.randint(counts[1], (n, pairs), generator=generator),
        "asked": torch.randint(pairs, (n, queries), generator=generator),
    }


def _spelled(
    symbols: Mapping[str, Tensor], keys: Tensor, values: Tensor, question: list[Tensor], answers: Tensor
) -> Batch:
    """Token ids of pairs [B,P], then of questions and answers [B,Q]."""
    pairs = torch.stack([keys, values], dim=-1)
    asked = torch.stack([*question, answers], dim=-1)
    tokens = torch.cat([keys.new_zeros(len(keys), 1), pairs.flatten(1), asked.flatten(1)], dim=1)
    first = 1 + 2 * torch.arange(keys.shape[1]).expand_as(keys)
    positions = 2 * keys.shape[1] + len(question) + asked.shape[2] * torch.arange(asked.shape[1])
    return Batch(tokens, positions.expand_as(answers), answers, symbols, {"keys": first, "values": first + 1})
