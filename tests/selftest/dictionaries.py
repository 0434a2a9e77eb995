"""Dictionaries of a world: oracles, whose atoms are the planted ones, and those that learned nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from saes import sae_of
from selftest.worlds import World, generator
from torch.nn.functional import normalize

from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae import WriteTopKSAE

D_SAE = 64
"""Atoms of a dictionary that learned nothing."""

Dictionaries = Mapping[str, WriteTopKSAE]
"""Dictionaries by label; the label of a single one is empty."""


def dictionary(
    world: World, atoms: LowRank, k: int = 1, *, target: str = "write", silent: int = 0, **how: object
) -> WriteTopKSAE:
    """As `sae_of` makes it, at the world's head; the last `silent` atoms never fire."""
    hook, name = world.hook.replace("write", target), world.model.cfg.model_name
    sae = sae_of(hook, name, atoms, k, rescale_acts_by_decoder_norm=False, **how)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        sae.b_enc[len(atoms) - silent :] = -1e6
    return sae


def planted_atoms(world: World) -> LowRank:
    """The matrices that the head of a world writes; ValueError where there are none."""
    if world.atoms is None:
        raise ValueError("nothing is planted in this world")
    return world.atoms


def random_atoms(world: World, n: int = D_SAE, rank: int = 1, seed: int = 7) -> LowRank:
    """Gaussian atoms at unit norm: an untrained dictionary."""
    atoms = LowRank(torch.empty(n, rank, world.k), torch.empty(n, rank, world.v)).random_like(generator(seed))
    return atoms.with_norm(torch.ones(n))


def blurred_atoms(world: World, seed: int, size: float) -> LowRank:
    """The planted atoms in random order, each side with noise of `size` of its norm."""
    own = planted_atoms(world)
    noise = random_atoms(world, len(own), seed=seed)
    order = torch.randperm(len(own), generator=generator(seed))
    sides = [
        normalize(a, dim=-1) + size * normalize(b, dim=-1)
        for a, b in zip((own.keys, own.values), (noise.keys, noise.values))
    ]
    return LowRank(*sides).with_norm(torch.ones(len(own))).rows(order)


# ---------------------------------------------------------------------------------------------- one dictionary


def oracle(world: World, k: int = 1) -> WriteTopKSAE:
    """The planted atoms, k of them active at a token."""
    return dictionary(world, planted_atoms(world), k)


def untrained(world: World, k: int = 1) -> WriteTopKSAE:
    """Random atoms, of which TopK takes those that fit best: what a dictionary is before training."""
    # `sae.controls.untrained` makes the same of a trained dictionary; here there is none to begin with.
    return dictionary(world, random_atoms(world), k)


def two_kinds(world: World) -> WriteTopKSAE:
    """Every other atom is a planted one whose value side is mixed with that of another, at a cosine of about 0.9. The
    rest write what is read of the planted ones, at a cosine near 0."""
    own = planted_atoms(world)
    read = own if world.read is None else world.read
    odd = (torch.arange(len(own)) % 2 == 1)[:, None, None]
    mixed = own.values + torch.linspace(0.3, 0.6, len(own))[:, None, None] * normalize(read.values.roll(2, 0), dim=-1)
    atoms = LowRank(torch.where(odd, read.keys, own.keys), torch.where(odd, read.values, mixed))
    return dictionary(world, atoms, read=own)


# ---------------------------------------------------------------------------------------------- several


def seeds(make: Callable[[int], LowRank], world: World) -> Dictionaries:
    """Two dictionaries with atoms of two seeds."""
    return {name: dictionary(world, make(seed)) for name, seed in (("a", 21), ("b", 22))}


DICTIONARIES: dict[str, Callable[[World], WriteTopKSAE | Dictionaries]] = {
    "oracle": oracle,
    "oracle, k 3": lambda world: oracle(world, 3),
    "blurred": lambda world: dictionary(world, blurred_atoms(world, 23, 0.05)),
    "untrained": untrained,
    "untrained, k 3": lambda world: untrained(world, 3),
    "two kinds": two_kinds,
    "seeds: the same atoms": lambda world: seeds(lambda seed: blurred_atoms(world, seed, 0.1), world),
    "seeds: atoms alike": lambda world: seeds(lambda seed: blurred_atoms(world, seed, 0.6), world),
    "seeds: untrained": lambda world: seeds(lambda seed: random_atoms(world, seed=seed), world),
    "oracle of writes, untrained on states": lambda world: {
        "write": oracle(world),
        "state": dictionary(world, random_atoms(world, 32), target="state"),
    },
    "untrained on writes and states": lambda world: {
        "write": dictionary(world, random_atoms(world, 32)),
        "state": dictionary(world, random_atoms(world, 32, seed=8), target="state"),
    },
    "oracle, flat untrained, rank 2": lambda world: {
        "WriteSAE": oracle(world),
        "FlatSAE": dictionary(world, random_atoms(world, 32), flat=True, silent=16),
        "rank 2": dictionary(world, LowRank.cat([planted_atoms(world), random_atoms(world, 32) * 1e-3])),
    },
    "oracle, flat oracle, rank 2 untrained": lambda world: {
        "WriteSAE": oracle(world),
        "FlatSAE": dictionary(world, planted_atoms(world), flat=True),
        "rank 2": dictionary(world, random_atoms(world, 32, 2)),
    },
}
"""Every dictionary, or set of dictionaries, by its name."""
