"""The methods, as a table: each is fitted to the writes of one head and gives a code for each seed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from sae_lens_writesae import LowRank, train, training_config
from writesae_study.known import sides
from writesae_study.known.sides import BATCH, LR, CodedSide, HeadCode, Size, of_atoms, of_labels, of_product, of_sides
from writesae_study.known.world import World


class Job(NamedTuple):
    """The writes of one head, the sizes that were chosen for them, and how long things train."""

    world: World
    head: int
    keys: Tensor
    """[N,K]"""
    values: Tensor
    """[N,V]"""
    key: Size
    value: Size
    seeds: int
    steps: int
    lr: float

    @classmethod
    def of(cls, world: World, head: int, seeds: int, steps: int, lr: float) -> Job:
        """Sizes are chosen without labels; a key has one active atom, a value up to four."""
        keys = world.keys[head].contiguous()
        values = world.values[head].contiguous()
        key = sides.choose_size(keys, (1,), steps // 2, lr)
        value = sides.choose_size(values, (1, 2, 3, 4), steps // 2, lr)
        return cls(world, head, keys, values, key, value, seeds, steps, lr)

    @property
    def n_atoms(self) -> int:
        """Atoms of a matrix dictionary with as many parameters as both sides have."""
        K = self.keys.shape[1]
        V = self.values.shape[1]
        return (self.key.atoms * K + self.value.atoms * V) // (K + V)

    def config(self, architecture: str, d_sae: int, seed: int, steps: int, **sae: int | str) -> Any:
        """SAELens' config of a dictionary of these writes."""
        holder = self.world.holder
        return training_config(
            self.world.model,
            holder.layer,
            holder.heads[self.head],
            architecture=architecture,
            d_sae=d_sae,
            sae=sae,
            seed=seed,
            context_size=8,
            train_batch_size_tokens=BATCH,
            training_tokens=BATCH * steps,
            lr=self.lr,
            verbose=False,
        )


Fit = Callable[[Job], list[HeadCode]]


def vector_autoencoders(job: Job) -> list[HeadCode]:
    """Keys and values apart."""
    seeds = range(job.seeds)
    of_keys = sides.vector_topk(job.keys, [Size(job.key.atoms, 1, seed) for seed in seeds], job.steps)
    of_values = sides.vector_topk(
        job.values, [Size(job.value.atoms, job.value.active, seed) for seed in seeds], job.steps
    )
    return [of_sides(key, value) for key, value in zip(of_keys, of_values)]


def by_side(job: Job, fit: Callable[[Tensor, int, int], CodedSide]) -> list[HeadCode]:
    """The same fit of keys and of values."""
    return [
        of_sides(fit(job.keys, job.key.atoms, seed), fit(job.values, job.value.atoms, seed))
        for seed in range(job.seeds)
    ]


def equal_bits_svd(job: Job) -> list[HeadCode]:
    """Singular vectors, whose coefficients have as many bits as a code of the values."""
    return by_side(job, partial(sides.svd, bits_most=sides.code_bits(job.value.atoms, job.value.active)))


def product(job: Job, start: str = "native", steps: int | None = None) -> list[HeadCode]:
    """Product dictionaries."""
    f_key = job.key.atoms
    f_value = job.value.atoms
    sides = {"f_key": f_key, "f_value": f_value, "k_value": job.value.active, "decoder_init": start}
    found = []
    for seed in range(job.seeds):
        cfg = job.config("writesae_product", f_key * f_value, seed, steps or job.steps, **sides)
        sae = train(cfg, LowRank.rank_one(job.keys, job.values))
        found.append(of_product(sae, job.keys, job.values))
    return found


def matrix_topk(job: Job, times: int, k: int | None) -> list[HeadCode]:
    """Dictionaries of matrices, `times` as many atoms as have as many parameters; k None: that of the values."""
    n = times * job.n_atoms
    active = min(job.value.active if k is None else k, n)
    configs = [job.config("writesae_topk", n, seed, job.steps, k=active) for seed in range(job.seeds)]
    saes = train(configs, [LowRank.rank_one(job.keys, job.values)] * len(configs))
    return [of_atoms(sae, job.keys, job.values, active) for sae in saes]


def of_facts(job: Job, permuted: bool = False) -> list[HeadCode]:
    """Vectors fitted to the symbols, or to those of other writes."""
    labels = one_hot(job.world.key_symbols).float()
    parts = job.world.parts(job.world.value_symbols)
    if permuted:
        order = _mixed_order(len(labels))
        labels = labels[order]
        parts = parts[order]
    return [of_sides(of_labels(job.keys, labels), of_labels(job.values, parts))]


def another_pair(job: Job) -> list[HeadCode]:
    """The truth of another write."""
    (code,) = of_facts(job)
    order = _mixed_order(len(code.written))
    return [
        code._replace(
            key_atom=code.key_atom[order],
            value_atom=code.value_atom[order],
            contribution=code.contribution[order],
            written=code.written[order],
        )
    ]


def _mixed_order(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


METHODS: dict[str, Fit] = {
    "vector TopK autoencoders of k and of u": vector_autoencoders,
    "product quantizer (k-means of k and of u)": partial(by_side, fit=sides.kmeans),
    "additive quantizers of k and of u": partial(by_side, fit=sides.additive),
    "residual quantizers of k and of u": partial(by_side, fit=sides.residual),
    "SVD of keys and of values, equal bits": equal_bits_svd,
    "writesae_product": product,
    "null: untrained writesae_product": partial(product, start="random", steps=1),
    "writesae_topk, equal parameters, k 1": partial(matrix_topk, times=1, k=1),
    "writesae_topk, equal parameters, k 4": partial(matrix_topk, times=1, k=4),
    "writesae_topk, equal parameters, k 32": partial(matrix_topk, times=1, k=32),
    "writesae_topk, 16 times the atoms, k 1": partial(matrix_topk, times=16, k=1),
    "writesae_topk, 16 times the atoms, k of the value side": partial(matrix_topk, times=16, k=None),
    "truth: vectors fitted to the symbols": of_facts,
    "null: vectors fitted to permuted symbols": partial(of_facts, permuted=True),
    "null: another pair's write": another_pair,
}
"""In the order of the board."""
BRIEF = (
    "product quantizer (k-means of k and of u)",
    "writesae_product",
    "null: untrained writesae_product",
    "null: another pair's write",
)
"""Those of the demo."""


def fits(
    world: World, head: int, seeds: int, steps: int, brief: bool = False, only: str | None = None
) -> dict[str, list[HeadCode]]:
    """Each method's codes of the writes of a head, one for each seed. `brief`: those of `BRIEF`, at a rate that is
    enough for a third of the steps. `only`: one method."""
    if only is not None:
        names = (only,)
    else:
        names = BRIEF if brief else tuple(METHODS)
    job = Job.of(world, head, seeds, steps, lr=1e-2 if brief else LR)
    return {name: METHODS[name](job) for name in names}
