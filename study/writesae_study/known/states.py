"""Which facts readers find in states, which are sums of writes whose factors nobody gave them.

A *reader* is fitted to states alone. It codes a state as terms of a key atom, a value atom and a coefficient. An atom
is named by the symbol whose presence in a text correlates most with its |coefficient|, in texts that no reader is
scored on. The score of a fact is the sum over terms, and over the heads that hold facts together, of |coefficient|
times both correlations. Read are the n facts with the highest scores, or all whose score is above a threshold, which
is set on the texts that name the atoms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sae_lens_writesae.sae import pursuit
from writesae_study.known.world import World

TERMS = 12
"""Pairs of atoms with which a state is read. Other atoms are as many as take as many bits."""
BLOCK = 512
"""Texts of a pass."""


class Told(NamedTuple):
    """N texts that tell facts: the states of the heads that hold them, and which facts these are."""

    states: Tensor
    """[N,H,K,V]"""
    facts: Tensor
    """[N,S,S'] whether the text tells that subject S has value S' (of composition: an attribute)."""

    @classmethod
    @torch.no_grad()
    def of(cls, world: World, pairs: int, n: int, seed: int) -> Told:
        """Fresh texts of so many pairs, and their states after the write of the last pair."""
        batch = world.task.batch(n, torch.Generator().manual_seed(seed), pairs=pairs)
        end = int(batch.places[world.holder.holds].max()) + world.holder.offset + 1
        texts = batch.tokens[:, :end].split(BLOCK)
        states = [world.model.recurrence(text, world.holder.layer).final_state() for text in texts]
        subjects = world.subjects(batch.symbols["keys"])
        parts = world.parts(batch.symbols["values"])
        facts = torch.zeros(n, world.n_subjects, parts.shape[-1])
        facts.index_put_((torch.arange(n)[:, None], subjects), parts, accumulate=True)
        return cls(torch.cat(states)[:, list(world.holder.heads)], facts > 0)


class StateCode(NamedTuple):
    """Terms of N states of one head."""

    keys: Tensor
    """[N,n] key atoms."""
    values: Tensor
    """[N,n] value atoms."""
    sizes: Tensor
    """[N,n] coefficients."""


class HeadReader(NamedTuple):
    """What codes the states of one head."""

    code: Callable[[Tensor], StateCode]
    """Of states [N,K,V]."""
    decode: Callable[[StateCode], Tensor]
    """[N,K V] what the terms add up to."""
    n_atoms: tuple[int, int]
    """Key atoms and value atoms."""
    numbers: int
    """Of which the atoms are made."""
    bits: float
    """Of the code of a state: log2 of the number of atoms, and 8 for the coefficient of each term."""

    @classmethod
    def of_pairs(cls, keys: Tensor, values: Tensor, terms: int) -> HeadReader:
        """By pursuit over all pairs of a key atom [F,K] and a value atom [F',V], with so many pairs."""
        keys = normalize(keys, dim=1)
        values = normalize(values, dim=1)
        counts = (len(keys), len(values))

        def code(states: Tensor) -> StateCode:
            found = pursuit.pairs_of(states, keys, values, terms, pursuit.LEAST_STOP)
            return StateCode(found.keys, found.values, found.coefficients)

        def decode(code: StateCode) -> Tensor:
            weighted = code.sizes[..., None] * keys[code.keys]
            return (weighted.mT @ values[code.values]).flatten(1)

        bits = terms * (sum(map(math.log2, counts)) + 8)
        return cls(code, decode, counts, keys.numel() + values.numel(), bits)

    @classmethod
    def of_atoms(cls, atoms: Tensor, numbers: int, bits: float) -> HeadReader:
        """By pursuit over atoms [F,K V], with as many terms as take so many bits."""
        atoms = normalize(atoms, dim=1)
        terms = terms_of(len(atoms), bits)

        def code(states: Tensor) -> StateCode:
            chosen, sizes = pursue(states.flatten(1), atoms, terms)
            return StateCode(chosen, chosen, sizes)

        def decode(code: StateCode) -> Tensor:
            return (code.sizes[:, None] @ atoms[code.keys])[:, 0]

        return cls(code, decode, (len(atoms), len(atoms)), numbers, terms * term_bits(len(atoms)))


def term_bits(n_atoms: int) -> float:
    """Of one of so many atoms and its coefficient."""
    return math.log2(n_atoms) + 8


def terms_of(n_atoms: int, bits: float) -> int:
    """Terms that take so many bits, or one of every atom."""
    return min(n_atoms, round(bits / term_bits(n_atoms)))


@torch.no_grad()
def pursue(rows: Tensor, atoms: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n atoms [N,n], of atoms [F,D] of norm 1, that rows [N,D] are sums of, and their coefficients [N,n]: the
    orthogonal matching pursuit of `sae.pursuit`, whose atoms are pairs."""
    gram = atoms @ atoms.T + 1e-4 * torch.eye(len(atoms))
    along = rows @ atoms.T
    left = along
    chosen = torch.zeros(len(rows), 0, dtype=torch.long)
    sizes = torch.zeros(len(rows), 0)
    for _ in range(n):
        best = left.abs().scatter(1, chosen, -1.0).argmax(1, keepdim=True)
        chosen = torch.cat([chosen, best], 1)
        among = gram[chosen[:, :, None], chosen[:, None]]
        sizes = torch.linalg.solve(among, along.gather(1, chosen)[..., None])[..., 0]
        left = along - (sizes[:, None] @ gram[chosen])[:, 0]
    return chosen, sizes


class AtomNames(NamedTuple):
    """Symbols of the atoms of one side, and how well each is named."""

    symbol: Tensor
    """[F]"""
    fit: Tensor
    """[F] correlation, at least 0."""

    @classmethod
    def of(cls, atoms: Tensor, n_atoms: int, sizes: Tensor, present: Tensor) -> AtomNames:
        """Of atoms [N,n] with coefficients, from symbols that are present [N,S] in texts."""
        fires = torch.zeros(len(atoms), n_atoms).scatter_add(1, atoms, sizes.abs())
        fit, symbol = (_standard_columns(fires).T @ _standard_columns(present.float()) / len(atoms)).max(1)
        return cls(symbol, fit.clamp_min(0))


def _standard_columns(x: Tensor) -> Tensor:
    """Columns of mean 0 and variance 1; a column that is constant is 0."""
    return (x - x.mean(0)) / x.std(0).clamp_min(1e-6)


class Reader(NamedTuple):
    """What gives every fact a score."""

    scores: Callable[[Tensor], Tensor]
    """[N,S,S'] of states [N,H,K,V]."""
    numbers: int
    bits: float
    """Of the code of a state."""
    threshold: float
    """Score from which on a fact is read where the number of facts is unknown."""

    @classmethod
    def of_heads(cls, heads: Sequence[HeadReader], naming: Told) -> Reader:
        """Facts that several heads share are joined."""
        named = list[tuple[AtomNames, AtomNames]]()
        for head, reader in enumerate(heads):
            code = reader.code(naming.states[:, head])
            keys = AtomNames.of(code.keys, reader.n_atoms[0], code.sizes, naming.facts.any(2))
            values = AtomNames.of(code.values, reader.n_atoms[1], code.sizes, naming.facts.any(1))
            named.append((keys, values))
        n_values = naming.facts.shape[2]

        def scores(states: Tensor) -> Tensor:
            total = torch.zeros(len(states), naming.facts[0].numel())
            for head, (keys, values) in enumerate(named):
                code = heads[head].code(states[:, head])
                weight = code.sizes.abs() * keys.fit[code.keys] * values.fit[code.values]
                fact = keys.symbol[code.keys] * n_values + values.symbol[code.values]
                total.scatter_add_(1, fact, weight)
            return total.view(len(states), -1, n_values)

        numbers = sum(head.numbers for head in heads)
        return cls.of_scores(scores, naming, numbers, sum(head.bits for head in heads))

    @classmethod
    def of_scores(cls, scores: Callable[[Tensor], Tensor], naming: Told, numbers: int, bits: float) -> Reader:
        """The threshold is that of the largest F1 in the texts that name the atoms."""
        found = scores(naming.states).flatten()
        order = found.argsort(descending=True)
        right = naming.facts.flatten()[order].cumsum(0)
        read = torch.arange(1, len(order) + 1)
        best = (2 * right / (read + naming.facts.sum())).argmax()
        return cls(scores, numbers, bits, float(found[order[best]].clamp_min(1e-9)))


class ReadShares(NamedTuple):
    """Shares, one a text [N]."""

    recall: Tensor
    """Of the facts told, among as many facts with the highest scores; this is also the precision."""
    other: Tensor
    """The same of the facts of another text."""
    recall_above: Tensor
    """Of the facts told, among those above the threshold."""
    precision_above: Tensor

    @classmethod
    def of(cls, reader: Reader, told: Told) -> ReadShares:
        """What a reader reads of texts, which all tell equally many facts."""
        scores = reader.scores(told.states).flatten(1)
        facts = told.facts.flatten(1)
        n = int(facts[0].sum())
        top = scores.topk(n, dim=1)
        highest = torch.zeros_like(facts).scatter(1, top.indices, top.values > 0)
        above = scores >= reader.threshold
        return cls(
            recall=(highest & facts).sum(1) / n,
            other=(highest & facts.roll(1, 0)).sum(1) / n,
            recall_above=(above & facts).sum(1) / n,
            precision_above=(above & facts).sum(1) / above.sum(1).clamp_min(1),
        )
