"""What a memory holds, as a list of facts, and memories with other facts.

A state is a sum of writes k u^T. A dictionary of pairs writes it as sum_n c_n p_n v_n^T, with key atoms p and value
atoms v that it learned from states alone. Each pair is a `Fact`; words name its atoms (`label_atoms`).
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hookpoints.errors import InputError, nearest

_HOOK = re.compile(r"blocks\.(\d+)\.mixer\.heads\.(\d+)\.hook_(\w+)_vec")
MOST_FACTS = 32
"""Facts that are read from a state where the number is not given, at most; of twice as many pairs."""
FACT_SIZE = 0.5
"""Share of the usual size of a pair from which it is read as a fact where the number is not given: a coefficient nearer
to the usual one than to none."""
FACT_STRENGTH = 0.15
"""The same as a share of the state's norm, for dictionaries without words, whose usual sizes are not known."""
PRESENT = 0.2
"""Share of a state's norm from which a pair names its atoms, where the number is not given."""
DEEPER = 0.1
"""Share of the norm down to which pairs are looked for where the number is not given: those that words name badly
stand between those that are facts. Deeper pairs fit what is left, and change the coefficients of facts."""
LEAST_SHARE = 1e-3
"""The same where the number is given."""
LEAST_APART = 0.1
"""Singular value of key atoms, as a share of the largest, below which they are taken to be the same."""
LEAST_NAMED = 0.2
"""Correlation from which a word names an atom, if shuffled texts have none as large."""
SHUFFLES = 99
"""Times that texts are shuffled: one in a hundred atoms that go with no word is named by chance."""


@dataclass(frozen=True)
class Fact:
    """A pair of a state. Prints as `Ben → Tokyo 0.93`, without its sign."""

    key: str
    value: str
    coefficient: float
    """Of atoms of norm 1, as a share of the state's norm, with a sign. Of several heads: the sum of |coefficient| times
    `named`."""
    key_atom: int
    value_atom: int
    """Numbers of the atoms; of several heads, in the dictionary in which the fact is strongest."""
    named: float
    """How well words name its atoms: the product of both correlations, 0 where an atom has no word, and 1 in a
    dictionary without words."""

    def __str__(self) -> str:
        return f"{self.key} → {self.value} {abs(self.coefficient):.2f}"

    @property
    def strength(self) -> float:
        """|coefficient| times how well words name the pair."""
        return abs(self.coefficient) * self.named


class Side(NamedTuple):
    """Words of the atoms of one side."""

    words: list[str | None]
    """The word that names each atom."""
    correlations: list[float]
    """Over states, of the atom's presence and the word's in the text before; 0 without a word."""
    sizes: list[float]
    """Mean |coefficient| where the atom is present. A pair has the product of both signs."""

    def atoms(self, word: str) -> list[int]:
        """Those that a word names, the best named first."""
        named = [atom for atom, own in enumerate(self.words) if own == word]
        return sorted(named, key=lambda atom: -self.correlations[atom])


class SumOfPairs(Protocol):
    """States [N,K,V] as sums of at most n pairs: numbers of atoms and coefficients [N,n], which are 0 behind the last
    pair."""

    @property
    def keys(self) -> Tensor: ...
    @property
    def values(self) -> Tensor: ...
    @property
    def coefficients(self) -> Tensor: ...
    def acts(self) -> Tensor:
        """[N,F_key*F_value], the coefficient of each pair of atoms."""
        ...


class PairDictionary(Protocol):
    """A dictionary of sums of pairs."""

    @property
    def cfg(self) -> Any:
        """Has `metadata` with `hook_name` and `labels`."""
        ...

    @property
    def directions(self) -> tuple[Tensor, Tensor]:
        """Key atoms [F_key,K] and value atoms [F_value,V]."""
        ...

    def pursue(self, matrices: Tensor, n: int, stop: float) -> SumOfPairs:
        """At most n pairs of each of the matrices [N,K,V], the strongest first; none below a share of the norm."""
        ...


@torch.no_grad()
def read_memory(states: Tensor, dictionary: PairDictionary, n: int | None = None) -> list[list[Fact]]:
    """The facts of each of the states [N,K,V], strongest first.

    Args:
        n: how many facts of each state, at most, of twice as many pairs. None: those whose coefficient times `named`
            is at least half of the usual size of such pairs (the root of the product of both atoms' sizes).

    Where words name atoms, a fact is as strong as its coefficient times how well it is named, and a pair without a name
    is none: what all states have in common takes pairs, too. Where none are named, coefficients alone count; without
    ``n``, those from `FACT_STRENGTH` of the norm.

    A dictionary of writes reads states too, with a warning: its pairs were not fitted to them.

    Raises:
        InputError: n is below 1, the dictionary has no pairs or atoms of another size, or its labels are damaged.
    """
    key_side, value_side = _words_of_side(dictionary, 0), _words_of_side(dictionary, 1)
    _check_count(n)
    wanted = (2 * MOST_FACTS, DEEPER) if n is None else (2 * n, LEAST_SHARE)
    pairs = _strongest_pairs(states, dictionary, *wanted)
    is_named = any((*key_side.words, *value_side.words))
    sizes = states.flatten(1).norm(dim=1, keepdim=True).clamp_min(1e-30).to(pairs.coefficients)
    shares = pairs.coefficients / sizes
    least = torch.full_like(shares, LEAST_SHARE if is_named or n else FACT_STRENGTH)
    if is_named and n is None:
        usual = _usual_sizes(key_side, value_side).to(shares)[pairs.keys, pairs.values]
        least = least.maximum(FACT_SIZE * usual / sizes)
    found = list[list[Fact]]()
    for pairs_of_one in zip(pairs.keys.tolist(), pairs.values.tolist(), shares.tolist(), least.tolist()):
        held = list[Fact]()
        for i, j, share, least_share in zip(*pairs_of_one):
            key = key_side.words[i] or f"key {i}"
            value = value_side.words[j] or f"value {j}"
            named = key_side.correlations[i] * value_side.correlations[j] if is_named else 1.0
            fact = Fact(key, value, share, i, j, named)
            if fact.strength >= least_share:
                held.append(fact)
        found.append(sorted(held, key=lambda fact: -fact.strength)[: n or MOST_FACTS])
    return found


def _usual_sizes(key_side: Side, value_side: Side) -> Tensor:
    """[F_key,F_value] of pairs: the root of the product of both atoms' sizes."""
    return torch.outer(torch.tensor(key_side.sizes), torch.tensor(value_side.sizes)).abs().sqrt()


def pair_name(dictionary: PairDictionary, number: int) -> str:
    """How facts of the pair of that number, key atom * F_value + value atom, are called: `Ben → Rome`."""
    values = _words_of_side(dictionary, 1).words
    i, j = divmod(number, len(values))
    return f"{_words_of_side(dictionary, 0).words[i] or f'key {i}'} → {values[j] or f'value {j}'}"


def joined_facts(heads: Sequence[Sequence[Fact]], n: int | None = None) -> list[Fact]:
    """The facts of several heads as one list, at most n, strongest first: of one fact, |coefficient| times `named` adds
    up."""
    sums: dict[tuple[str, str], Fact] = {}
    for fact in sorted((fact for facts in heads for fact in facts), key=lambda fact: -fact.strength):
        first = sums.setdefault((fact.key, fact.value), replace(fact, coefficient=0.0))
        sums[fact.key, fact.value] = replace(first, coefficient=first.coefficient + fact.strength)
    return sorted(sums.values(), key=lambda fact: -fact.coefficient)[:n]


# ------------------------------------------------------------------------------------------------ words


@torch.no_grad()
def label_atoms(
    dictionary: PairDictionary,
    states: Tensor,
    texts: Sequence[Collection[str]],
    *,
    key_words: Collection[str] | None = None,
    value_words: Collection[str] | None = None,
    n: int | None = None,
) -> None:
    """Name the atoms of a dictionary by words, and keep the names in its metadata, which are saved with it.

    An atom's word is the one whose presence in the text correlates most, over states, with the atom's presence in the
    pairs of the state. An atom has none below a correlation of 0.2, or where some word correlates as much in one of 99
    shuffles of the texts. So an atom that goes with no word is named with a probability of 1%, at most; of more where
    several states come from one text.

    Args:
        states: [N,K,V], after N texts.
        texts: the words or tokens of each text up to its state.
        key_words, value_words: the words that are tried for a side; None: all of the texts.
        n: pairs of a state, as in `read_memory`.

    Cost: N F_key F_value (V + n) for the pairs, 100 N F W for W words.

    Raises:
        InputError: as of `read_memory`, or not as many texts as states.
    """
    if len(texts) != len(states):
        raise InputError(f"texts: expected one of each of the {len(states)} states, got {len(texts)}")
    _check_count(n)
    pairs = _strongest_pairs(states, dictionary, n or MOST_FACTS, LEAST_SHARE if n else PRESENT)
    keys, values = dictionary.directions
    grid = pairs.acts().view(-1, len(keys), len(values))
    of_keys, of_values = _atom_signs(grid.sum(0))
    oriented = pairs.coefficients * of_keys[pairs.keys] * of_values[pairs.values]
    sides = {
        "keys": _words_of_atoms(pairs.keys, oriented, of_keys, texts, key_words),
        "values": _words_of_atoms(pairs.values, oriented, of_values, texts, value_words),
    }
    largest = grid.amax(0).maximum(-grid.amin(0))
    seen = (largest > 0) & (largest >= FACT_SIZE * _usual_sizes(sides["keys"], sides["values"]).to(largest))
    labels: dict[str, object] = {name: side._asdict() for name, side in sides.items()}
    labels["seen"] = [row.nonzero().flatten().tolist() for row in seen]
    dictionary.cfg.metadata.labels = labels


def _atom_signs(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Signs of key atoms [F_key] and of value atoms [F_value], whose products are those of nearly all sums of
    coefficients [F_key,F_value]: a pair has one sign, its atoms have it only together."""
    of_values = torch.ones_like(pairs[0])
    of_keys = torch.ones_like(pairs[:, 0])
    for _ in range(10):
        of_keys = torch.where(pairs @ of_values < 0, -1.0, 1.0).to(pairs)
        of_values = torch.where(of_keys @ pairs < 0, -1.0, 1.0).to(pairs)
    return of_keys, of_values


def _words_of_atoms(
    atoms: Tensor, oriented: Tensor, signs: Tensor, texts: Sequence[Collection[str]], words: Collection[str] | None
) -> Side:
    """Words of the atoms of one side, of which states have ``atoms`` [N,n] with coefficients [N,n] times both signs."""
    sums = oriented.new_zeros(len(atoms), len(signs)).scatter_add(1, atoms, oriented)
    active = (sums != 0).to(sums)
    tried = sorted(set[str]().union(*texts) if words is None else words)
    present = torch.tensor([[word in text for word in tried] for text in map(set, texts)]).to(sums)
    correlations, best = _column_correlations(active, present).max(1)
    chance = torch.full_like(correlations, LEAST_NAMED)
    drawn = torch.Generator().manual_seed(0)
    for _ in range(SHUFFLES):
        shuffled = present[torch.randperm(len(present), generator=drawn).to(present.device)]
        chance = chance.maximum(_column_correlations(active, shuffled).amax(1))
    named = correlations > chance
    return Side(
        words=[tried[word] if is_named else None for word, is_named in zip(best.tolist(), named.tolist())],
        correlations=correlations.where(named, 0).tolist(),
        sizes=(signs * sums.sum(0).abs() / active.sum(0).clamp_min(1)).tolist(),
    )


def _column_correlations(active: Tensor, present: Tensor) -> Tensor:
    """[F,W] of columns [N,F] and [N,W]; 0 of those that do not vary."""
    one = normalize(active - active.mean(0), dim=0)
    other = normalize(present - present.mean(0), dim=0)
    return one.T @ other


def _words_of_side(dictionary: PairDictionary, number: int) -> Side:
    """Words of the key atoms (0) or of the value atoms (1). Files of strangers have them, too."""
    count = len(_pair_directions(dictionary)[number])
    labels = dictionary.cfg.metadata.labels
    unnamed = Side([None] * count, [0.0] * count, [0.0] * count)
    if labels is None:
        return unnamed
    try:
        side = Side(**labels[("keys", "values")[number]])
        numbers = torch.tensor([side.correlations, side.sizes])
        is_whole = len(side.words) == count and all(isinstance(word, str | None) for word in side.words)
        is_whole &= numbers.shape == (2, count) and bool(numbers.isfinite().all())
    except (KeyError, TypeError, ValueError):
        side = unnamed
        is_whole = False
    if not is_whole:
        raise InputError(
            f"labels: expected words, correlations and sizes of {count} atoms, got others; call label_atoms again"
        )
    return side


# ------------------------------------------------------------------------------------------------ other facts


@torch.no_grad()
def rewritten(
    states: Tensor, dictionary: PairDictionary, key: str, value: str | None, instead_of: str | None
) -> tuple[Tensor, bool]:
    """States [N,K,V] in which a key has a value `instead_of` another (None: besides those it has), or loses that one
    (`value` None); and whether some state held the old fact.

    What leaves is the pairs of the key with the old value, and all of the state along that value that no other of its
    keys reads. What comes is a pair of the best named atoms, as large as pairs with this value usually are.

    Each word has to name an atom (`lacking`).
    """
    key_side = _words_of_side(dictionary, 0)
    value_side = _words_of_side(dictionary, 1)
    key_atoms = key_side.atoms(key)
    keys, values = (normalize(side, dim=1).to(states) for side in _pair_directions(dictionary))
    is_held = True
    changed = states
    if instead_of is not None:
        value_atoms = value_side.atoms(instead_of)
        pairs = _strongest_pairs(states, dictionary, MOST_FACTS, DEEPER)
        grid = pairs.acts().to(states).view(len(states), len(keys), len(values))
        found = grid[:, key_atoms][:, :, value_atoms]
        is_held = bool(found.any())
        left = states - keys[key_atoms].T @ found @ values[value_atoms]
        others = grid.any(2)  # [N,F_key]
        others[:, key_atoms] = False
        changed = _cleared_states(left, keys * others[..., None], values[value_atoms])
    if value is not None:
        new = value_side.atoms(value)[0]
        size = math.copysign(value_side.sizes[new], key_side.sizes[key_atoms[0]] * value_side.sizes[new])
        changed = changed + size * torch.outer(keys[key_atoms[0]], values[new])
    return changed, is_held


def _cleared_states(states: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """States [N,K,V] with nothing along values [n,V] but what keys [N,F,K] read, of which some are 0: a query is not
    exactly the key atom of its fact, and finds traces of the fact near to it."""
    along = states @ torch.linalg.pinv(values) @ values
    shared = torch.linalg.pinv(keys, rtol=LEAST_APART) @ keys @ along
    return states - along + shared


def lacking(dictionary: PairDictionary, key: str, *values: str | None) -> str:
    """The words that name no atom of their side, with the nearest that do; empty where all do."""
    wanted = [(0, key), *((1, value) for value in values if value is not None)]
    sides = [_words_of_side(dictionary, 0), _words_of_side(dictionary, 1)]
    missing = [(side, word) for side, word in wanted if word not in sides[side].words]
    return ", ".join(repr(word) + nearest(word, {*filter(None, sides[side].words)}) for side, word in missing)


def is_usual(dictionary: PairDictionary, key: str, value: str) -> bool:
    """Whether some state that named the atoms had the value with the key, or with one that shares a value with it; True
    of dictionaries that were named before this was stored.

    Raises:
        InputError: the labels are damaged.
    """
    key_side, value_side = _words_of_side(dictionary, 0), _words_of_side(dictionary, 1)
    seen_values = dictionary.cfg.metadata.labels.get("seen")
    if seen_values is None:
        return True
    seen = torch.zeros(len(key_side.words), len(value_side.words), dtype=torch.bool)
    try:
        for atom, held in enumerate(seen_values):
            seen[atom, torch.tensor(held, dtype=torch.long)] = True
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"labels: expected the values of each key under 'seen', got others ({error})") from None
    # What all states have in common has no words, and every value is seen with it.
    seen &= torch.tensor([word is not None for word in key_side.words])[:, None]
    seen &= torch.tensor([word is not None for word in value_side.words])
    own = seen[key_side.atoms(key)].any(0)
    alike = (seen & own).any(1)
    return bool((own | seen[alike].any(0))[value_side.atoms(value)].any())


# ------------------------------------------------------------------------------------------------ helpers


def _check_count(n: int | None) -> None:
    if n is not None and n < 1:
        raise InputError(f"n: expected a number of facts from 1 on, or None, got {n}")


def _strongest_pairs(states: Tensor, dictionary: PairDictionary, n: int, least: float) -> SumOfPairs:
    """At most n pairs of each state, down to a share of its norm."""
    sides = _pair_directions(dictionary)
    wanted = (sides[0].shape[1], sides[1].shape[1])
    if states.ndim != 3 or states.shape[1:] != wanted:
        raise InputError(f"states: expected [N,K,V] with K, V = {wanted} of the atoms, got {tuple(states.shape)}")
    if "hook_write" in str(dictionary.cfg.metadata.hook_name):
        warnings.warn(
            "a dictionary of writes reads states: its pairs were fitted to single writes, not to sums", stacklevel=3
        )
    return dictionary.pursue(states.to(sides[0]), min(n, len(sides[0]) * len(sides[1])), least)


@torch.no_grad()
def _pair_directions(dictionary: PairDictionary) -> tuple[Tensor, Tensor]:
    if not hasattr(dictionary, "pursue"):
        raise InputError(
            f"dictionary: expected one of pairs (with `pursue` and `directions`), got {type(dictionary).__name__}"
        )
    return dictionary.directions


def place_of(dictionary: PairDictionary, layer: int | None, head: int | None) -> tuple[int, int]:
    """The layer and the head of a dictionary, which its metadata names, or else the caller.

    Raises:
        InputError: it is one of another head than the caller names, or neither names one.
    """
    _pair_directions(dictionary)
    match = _HOOK.fullmatch(str(dictionary.cfg.metadata.hook_name))
    own = (int(match[1]), int(match[2])) if match else (layer, head)
    if own[0] is None or own[1] is None:
        raise InputError("layer, head: expected both, because the dictionary names no head; got none")
    if layer not in (None, own[0]) or head not in (None, own[1]):
        raise InputError(f"layer, head: expected {own}, the head of the dictionary, got {(layer, head)}")
    return own[0], own[1]
