"""The readers of states, as a table: each is fitted to states of texts and gives every fact a score."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from sae_lens_writesae import train_on_states, training_config
from writesae.known.sides import Size, kmeans, of_labels, vector_topk
from writesae.known.states import TERMS, Code, HeadReader, Reader, Told, term_bits, terms_of
from writesae.known.world import World

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


class Job(NamedTuple):
    """The texts to which readers are fitted, and how long they train."""

    world: World
    fitted: Told
    """Texts whose states are given, without their facts."""
    naming: Told
    """Texts that name the atoms."""
    steps: int
    seed: int
    sides: dict[int, list[Tensor]]
    """Of each head: the key atoms and value atoms of pairs, once they are learned."""
    times: float = 1.0
    """How many times as many atoms of a side there are as symbols."""

    @property
    def counts(self) -> tuple[int, int]:
        """Key atoms and value atoms."""
        n_values = self.naming.facts.shape[2]
        return round(self.times * self.world.task.n_keys), round(self.times * n_values)

    @property
    def widths(self) -> tuple[int, int]:
        """K and V."""
        K, V = self.fitted.states.shape[2:]
        return K, V

    @property
    def numbers(self) -> int:
        """Numbers of the atoms of both sides."""
        return sum(n * width for n, width in zip(self.counts, self.widths))

    @property
    def bits(self) -> float:
        """Of a state of one head."""
        return TERMS * (sum(map(math.log2, self.counts)) + 8)

    def states(self, head: int) -> Tensor:
        """[N,K,V] of one head."""
        return self.fitted.states[:, head].contiguous()

    def by_head(self, fit: Callable[[Job, int], HeadReader]) -> Reader:
        """The same fit of every head."""
        heads = range(len(self.world.holder.heads))
        return Reader.of_heads([fit(self, head) for head in heads], self.naming)

    def trained(self, head: int, architecture: str, d_sae: int, **sae: object) -> Any:
        """A dictionary of the states of one head."""
        holder = self.world.holder
        cfg = training_config(
            self.world.model,
            holder.layer,
            holder.heads[head],
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
        return train_on_states(cfg, self.states(head))


# ------------------------------------------------------------------------------------------------ of pairs


def learned_sides(job: Job, head: int) -> list[Tensor]:
    """Key atoms and value atoms of `writesae_product`, which codes states by pursuit over pairs."""
    if head not in job.sides:
        f_key, f_value = job.counts
        sizes = {"f_key": f_key, "f_value": f_value, "n_pairs": FITTED_TERMS}
        sae = job.trained(head, "writesae_product", f_key * f_value, encoder="pursuit", **sizes)
        job.sides[head] = [side.detach() for side in sae.directions]
    return job.sides[head]


def learned(job: Job, head: int) -> HeadReader:
    """Pairs learned from states."""
    return HeadReader.of_pairs(*learned_sides(job, head))


def shuffled(job: Job, head: int) -> HeadReader:
    """Learned pairs, the channels of either side in another order."""
    generator = torch.Generator().manual_seed(job.seed)
    mixed = [side[:, torch.randperm(side.shape[1], generator=generator)] for side in learned_sides(job, head)]
    return HeadReader.of_pairs(*mixed)


def drawn(job: Job, head: int) -> HeadReader:
    """Random directions."""
    generator = torch.Generator().manual_seed(job.seed)
    return HeadReader.of_pairs(*(torch.randn(n, D, generator=generator) for n, D in zip(job.counts, job.widths)))


def rows_and_columns(job: Job, head: int) -> HeadReader:
    """TopK dictionaries of the columns of states, for the keys, and of their rows, for the values."""
    states = job.states(head)
    sides = list[Tensor]()
    for vectors, n in zip((states.mT, states), job.counts):
        rows = torch.cat([vectors, -vectors]).flatten(0, 1)  # a column may have either sign
        (side,) = vector_topk(rows, [Size(n, FITTED_PAIRS, job.seed)], job.steps)
        sides.append(side.atoms)
    return HeadReader.of_pairs(*sides)


def singular_vectors(job: Job, head: int) -> HeadReader:
    """k-means of the first singular vectors of states."""
    left, _, right = torch.linalg.svd(job.states(head), full_matrices=False)
    sides = list[Tensor]()
    for vectors, n in zip((left.mT, right), job.counts):
        rows = vectors[:, :FITTED_PAIRS].flatten(0, 1)
        largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
        sides.append(kmeans(rows * largest.sign(), n, job.seed).atoms)
    return HeadReader.of_pairs(*sides)


def of_writes(job: Job, head: int) -> HeadReader:
    """k-means of the factors of writes."""
    factors = (job.world.keys[head], job.world.values[head])
    return HeadReader.of_pairs(*(kmeans(normalize(x, dim=1), n, job.seed).atoms for x, n in zip(factors, job.counts)))


def of_symbols(job: Job, head: int) -> HeadReader:
    """The vectors that explain the factors of writes best, given their symbols."""
    keys = of_labels(job.world.keys[head], one_hot(job.world.key_symbols).float())
    values = of_labels(job.world.values[head], job.world.parts(job.world.value_symbols))
    return HeadReader.of_pairs(keys.atoms, values.atoms)


# ------------------------------------------------------------------------------------------------ of atoms


def atoms(job: Job, head: int, architecture: str, times: int, flat: bool) -> HeadReader:
    """Atoms of rank one, or any, of so many times the numbers of the pairs: read by the encoder of `writesae_topk`, or
    learned by `writesae_matching_pursuit` and read by pursuit."""
    size = math.prod(job.widths) if flat else sum(job.widths)
    n = max(2, times * job.numbers // size)
    options: dict[str, object] = {"k": min(FITTED_TERMS, n), "decoder": "flat" if flat else "rank"}
    if architecture == "writesae_topk":
        options["encoder"] = "dense" if flat else "bilinear"
    sae = job.trained(head, architecture, n, **options)
    if architecture == "writesae_matching_pursuit":
        return HeadReader.of_atoms(sae.W_dec.detach(), n * size, job.bits)
    terms = terms_of(n, job.bits)
    return HeadReader(partial(_encoded, sae, terms), (n, n), n * size, terms * term_bits(n))


@torch.no_grad()
def _encoded(sae: Any, terms: int, states: Tensor) -> Code:
    """The strongest atoms of states [N,K,V]."""
    contributions = sae.encode(states.flatten(1)) * sae.decoder_norm()
    top = contributions.topk(terms, dim=1)
    return Code(top.indices, top.indices, top.values)


def principal(job: Job, head: int) -> HeadReader:
    """Principal directions of states."""
    states = job.states(head).flatten(1)
    directions = torch.linalg.eigh(states.T @ states).eigenvectors[:, -PRINCIPAL:].T
    return HeadReader.of_atoms(directions, directions.numel(), job.bits)


def probe(job: Job) -> Reader:
    """Ridge regression of the facts on states, with `PROBED` labeled texts."""
    seen = Told.of(job.world, FITTED_PAIRS, PROBED, seed=99)
    x = seen.states.flatten(1)
    gram = x.T @ x
    ridge = gram.diagonal().mean() * torch.eye(len(gram))
    weights = torch.linalg.solve(gram + ridge, x.T @ seen.facts.flatten(1).float())

    def scores(states: Tensor) -> Tensor:
        return (states.flatten(1) @ weights).unflatten(1, seen.facts.shape[1:])

    return Reader.of_scores(scores, job.naming, weights.numel(), math.nan)


def of_heads(fit: Callable[..., HeadReader], **options: object) -> Callable[[Job], Reader]:
    """A fit of every head."""
    return lambda job: job.by_head(partial(fit, **options))


TOPK = partial(of_heads, atoms, architecture="writesae_topk")
PURSUIT = partial(of_heads, atoms, architecture="writesae_matching_pursuit")
STATES_ALONE: dict[str, Callable[[Job], Reader]] = {
    "pairs (writesae_product)": of_heads(learned),
    "rank-1 atoms, pursuit, equal numbers": PURSUIT(times=1, flat=False),
    "rank-1 atoms, pursuit, 16 times the numbers": PURSUIT(times=16, flat=False),
    "flat atoms, pursuit, equal numbers": PURSUIT(times=1, flat=True),
    "flat atoms, pursuit, 64 times the numbers": PURSUIT(times=64, flat=True),
    "rank-1 TopK, equal numbers": TOPK(times=1, flat=False),
    "rank-1 TopK, 16 times the numbers": TOPK(times=16, flat=False),
    "flat TopK, 64 times the numbers": TOPK(times=64, flat=True),
    "vector dictionaries of rows and of columns": of_heads(rows_and_columns),
    "singular vectors, clustered": of_heads(singular_vectors),
    "principal directions": of_heads(principal),
}
"""Readers that are fitted to states, without writes or labels."""
READERS = STATES_ALONE | {
    "codes of writes (k-means)": of_heads(of_writes),
    "labels: linear probe": probe,
    "labels: vectors fitted to the symbols of writes": of_heads(of_symbols),
    "null: random pairs": of_heads(drawn),
    "null: learned pairs, channels shuffled": of_heads(shuffled),
}
"""In the order of the board."""
FIXED = ("principal directions", "labels: linear probe", "labels: vectors fitted to the symbols of writes")
"""Readers whose seeds do not differ."""
WRONG_SIZES = (0.5, 0.75, 1.5, 2.0)
"""Times as many atoms of pairs as there are symbols, which are tried too."""
