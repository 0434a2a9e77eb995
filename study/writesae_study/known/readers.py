"""The readers of states, as a table: each is fitted to states of texts and gives every fact a score."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from hookpoints import HookedRecurrent
from sae_lens_writesae import train, training_config
from writesae_study.known.sides import Size, kmeans, of_labels, vector_topk
from writesae_study.known.states import TERMS, HeadReader, Reader, StateCode, Told, term_bits, terms_of
from writesae_study.known.world import World

FITTED_PAIRS = 4
"""Pairs of the texts to whose states readers are fitted."""
FITTED = 4000
"""So many texts."""
FITTED_TERMS = 7
"""Terms of a state while atoms are learned."""
NAMING = 2000
"""Texts that name atoms."""
PROBED = 8000
"""Labeled texts of the linear probe."""
PRINCIPAL = 64
"""Principal directions."""
BATCH = 96
"""States of a step."""
LR = 1e-2
TOPK = "writesae_topk"
PURSUIT = "writesae_matching_pursuit"


@dataclass(frozen=True, eq=False)
class HeadStates:
    """What readers of one head are fitted to, and how long they train."""

    model: HookedRecurrent
    layer: int
    head: int
    states: Tensor
    """[N,K,V]"""
    counts: tuple[int, int]
    """Key atoms and value atoms."""
    steps: int
    seed: int
    terms: int = TERMS
    """Pairs with which a state is read."""
    fitted_terms: int = FITTED_TERMS
    """The same while atoms are learned."""

    @property
    def widths(self) -> tuple[int, int]:
        """K and V."""
        K, V = self.states.shape[1:]
        return K, V

    @property
    def numbers(self) -> int:
        """Numbers of the atoms of both sides."""
        return sum(n * width for n, width in zip(self.counts, self.widths))

    @property
    def bits(self) -> float:
        """Of a state."""
        return self.terms * (sum(map(math.log2, self.counts)) + 8)

    def trained(self, architecture: str, d_sae: int, **sae: object) -> Any:
        """A dictionary of the states."""
        cfg = training_config(
            self.model,
            self.layer,
            self.head,
            target="last_state",
            architecture=architecture,
            d_sae=d_sae,
            sae=sae,
            seed=self.seed,
            context_size=8,
            train_batch_size_tokens=BATCH,
            training_tokens=BATCH * self.steps,
            lr=LR,
            verbose=False,
        )
        return train(cfg, self.states)

    @cached_property
    def sides(self) -> tuple[Tensor, Tensor]:
        """Key atoms and value atoms of `writesae_product`, which codes states by pursuit over pairs."""
        f_key, f_value = self.counts
        sizes = {"f_key": f_key, "f_value": f_value, "n_pairs": self.fitted_terms}
        sae = self.trained("writesae_product", f_key * f_value, encoder="pursuit", **sizes)
        keys, values = sae.directions
        return keys.detach(), values.detach()


@dataclass(frozen=True, eq=False)
class ReaderJob:
    """The texts to which readers of one model are fitted."""

    world: World
    fitted: Told
    """Texts whose states are given, without their facts."""
    naming: Told
    """Texts that name the atoms."""
    steps: int
    seed: int
    times: float = 1.0
    """How many times as many atoms of a side there are as symbols."""

    @cached_property
    def heads(self) -> list[HeadStates]:
        """The heads that hold the facts together."""
        n_values = self.naming.facts.shape[2]
        counts = (round(self.times * self.world.task.n_keys), round(self.times * n_values))
        model = self.world.model
        holder = self.world.holder
        heads = list[HeadStates]()
        for head, states in zip(holder.heads, self.fitted.states.unbind(1)):
            heads.append(HeadStates(model, holder.layer, head, states.contiguous(), counts, self.steps, self.seed))
        return heads


# ------------------------------------------------------------------------------------------------ of pairs


def learned(head: HeadStates) -> HeadReader:
    """Pairs learned from states."""
    return HeadReader.of_pairs(*head.sides, head.terms)


def shuffled(head: HeadStates) -> HeadReader:
    """Learned pairs, the channels of either side in another order."""
    generator = torch.Generator().manual_seed(head.seed)
    mixed = [side[:, torch.randperm(side.shape[1], generator=generator)] for side in head.sides]
    return HeadReader.of_pairs(mixed[0], mixed[1], head.terms)


def drawn(head: HeadStates) -> HeadReader:
    """Random directions."""
    generator = torch.Generator().manual_seed(head.seed)
    sides = [torch.randn(n, D, generator=generator) for n, D in zip(head.counts, head.widths)]
    return HeadReader.of_pairs(sides[0], sides[1], head.terms)


def rows_and_columns(head: HeadStates) -> HeadReader:
    """TopK dictionaries of the columns of states, for the keys, and of their rows, for the values."""
    sides = list[Tensor]()
    for vectors, n in zip((head.states.mT, head.states), head.counts):
        rows = torch.cat([vectors, -vectors]).flatten(0, 1)  # a column may have either sign
        (side,) = vector_topk(rows, [Size(n, FITTED_PAIRS, head.seed)], head.steps)
        sides.append(side.atoms)
    return HeadReader.of_pairs(sides[0], sides[1], head.terms)


def singular_vectors(head: HeadStates) -> HeadReader:
    """k-means of the first singular vectors of states."""
    left, _, right = torch.linalg.svd(head.states, full_matrices=False)
    sides = list[Tensor]()
    for vectors, n in zip((left.mT, right), head.counts):
        rows = vectors[:, :FITTED_PAIRS].flatten(0, 1)
        largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
        sides.append(kmeans(rows * largest.sign(), n, head.seed).atoms)
    return HeadReader.of_pairs(sides[0], sides[1], head.terms)


def means_of_writes(job: ReaderJob) -> Reader:
    """k-means of the factors of writes."""
    readers = list[HeadReader]()
    for head, keys, values in zip(job.heads, job.world.keys, job.world.values):
        sides = [kmeans(normalize(x, dim=1), n, job.seed).atoms for x, n in zip((keys, values), head.counts)]
        readers.append(HeadReader.of_pairs(sides[0], sides[1], head.terms))
    return Reader.of_heads(readers, job.naming)


def of_symbols(job: ReaderJob) -> Reader:
    """The vectors that explain the factors of writes best, given their symbols."""
    of_keys = one_hot(job.world.key_symbols).float()
    of_values = job.world.parts(job.world.value_symbols)
    readers = list[HeadReader]()
    for head, keys, values in zip(job.heads, job.world.keys, job.world.values):
        sides = [of_labels(keys, of_keys).atoms, of_labels(values, of_values).atoms]
        readers.append(HeadReader.of_pairs(sides[0], sides[1], head.terms))
    return Reader.of_heads(readers, job.naming)


# ------------------------------------------------------------------------------------------------ of atoms


def atoms(head: HeadStates, architecture: str, times: int, flat: bool) -> HeadReader:
    """Atoms of rank one, or any, of so many times the numbers of the pairs: read by the encoder of `writesae_topk`, or
    learned by `writesae_matching_pursuit` and read by pursuit."""
    size = math.prod(head.widths) if flat else sum(head.widths)
    n = max(2, times * head.numbers // size)
    options: dict[str, object] = {"k": min(head.fitted_terms, n), "decoder": "flat" if flat else "rank"}
    if architecture == TOPK:
        options["encoder"] = "dense" if flat else "bilinear"
    sae = head.trained(architecture, n, **options)
    if architecture == PURSUIT:
        return HeadReader.of_atoms(sae.W_dec.detach(), n * size, head.bits)
    terms = terms_of(n, head.bits)
    decode = partial(_decoded_states, sae)
    return HeadReader(partial(_strongest_terms, sae, terms), decode, (n, n), n * size, terms * term_bits(n))


@torch.no_grad()
def _strongest_terms(sae: Any, terms: int, states: Tensor) -> StateCode:
    """The strongest atoms of states [N,K,V]."""
    contributions = sae.encode(states.flatten(1)) * sae.decoder_norm()
    top = contributions.topk(terms, dim=1)
    return StateCode(top.indices, top.indices, top.values)


@torch.no_grad()
def _decoded_states(sae: Any, code: StateCode) -> Tensor:
    """[N,K V]"""
    acts = torch.zeros(len(code.keys), sae.cfg.d_sae).scatter(1, code.keys, code.sizes)
    return sae.decode(acts / sae.decoder_norm())


def principal(head: HeadStates) -> HeadReader:
    """Principal directions of states."""
    states = head.states.flatten(1)
    directions = torch.linalg.eigh(states.T @ states).eigenvectors[:, -PRINCIPAL:].T
    return HeadReader.of_atoms(directions, directions.numel(), head.bits)


def probe(job: ReaderJob) -> Reader:
    """Ridge regression of the facts on states, with `PROBED` labeled texts."""
    seen = Told.of(job.world, FITTED_PAIRS, PROBED, seed=99)
    x = seen.states.flatten(1)
    gram = x.T @ x
    ridge = gram.diagonal().mean() * torch.eye(len(gram))
    weights = torch.linalg.solve(gram + ridge, x.T @ seen.facts.flatten(1).float())

    def scores(states: Tensor) -> Tensor:
        return (states.flatten(1) @ weights).unflatten(1, seen.facts.shape[1:])

    return Reader.of_scores(scores, job.naming, weights.numel(), math.nan)


HeadFit = Callable[[HeadStates], HeadReader]
OF_STATES: dict[str, HeadFit] = {
    "pairs (writesae_product)": learned,
    "rank-1 atoms, pursuit, equal numbers": partial(atoms, architecture=PURSUIT, times=1, flat=False),
    "rank-1 atoms, pursuit, 16 times the numbers": partial(atoms, architecture=PURSUIT, times=16, flat=False),
    "flat atoms, pursuit, equal numbers": partial(atoms, architecture=PURSUIT, times=1, flat=True),
    "flat atoms, pursuit, 64 times the numbers": partial(atoms, architecture=PURSUIT, times=64, flat=True),
    "rank-1 TopK, equal numbers": partial(atoms, architecture=TOPK, times=1, flat=False),
    "rank-1 TopK, 16 times the numbers": partial(atoms, architecture=TOPK, times=16, flat=False),
    "flat TopK, 64 times the numbers": partial(atoms, architecture=TOPK, times=64, flat=True),
    "vector dictionaries of rows and of columns": rows_and_columns,
    "singular vectors, clustered": singular_vectors,
    "principal directions": principal,
}
"""Readers that are fitted to states of a head, without writes or labels."""
NULLS: dict[str, HeadFit] = {
    "null: random pairs": drawn,
    "null: learned pairs, channels shuffled": shuffled,
}


def of_heads(fits: Mapping[str, HeadFit]) -> dict[str, Callable[[ReaderJob], Reader]]:
    """The same fit of every head, whose facts are joined."""

    def joined(fit: HeadFit, job: ReaderJob) -> Reader:
        return Reader.of_heads([fit(head) for head in job.heads], job.naming)

    return {name: partial(joined, fit) for name, fit in fits.items()}


READERS: dict[str, Callable[[ReaderJob], Reader]] = {
    **of_heads(OF_STATES),
    "codes of writes (k-means)": means_of_writes,
    "labels: linear probe": probe,
    "labels: vectors fitted to the symbols of writes": of_symbols,
    **of_heads(NULLS),
}
"""In the order of the board."""
FIXED = ("principal directions", "labels: linear probe", "labels: vectors fitted to the symbols of writes")
"""Readers whose seeds do not differ."""
WRONG_SIZES = (0.5, 0.75, 1.5, 2.0)
"""Times as many atoms of pairs as there are symbols, which are tried too."""
