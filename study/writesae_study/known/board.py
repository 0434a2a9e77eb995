"""The rows of one model: for each method what it finds, and how often its atoms write a fact; and for each reader which
facts it finds in states."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from writesae_study.known import readers
from writesae_study.known.methods import fits
from writesae_study.known.readers import FITTED_PAIRS, FIXED, READERS, WRONG_SIZES, ReaderJob
from writesae_study.known.scores import attributed, features, purity
from writesae_study.known.sides import HeadCode
from writesae_study.known.states import Reader, ReadShares, Told
from writesae_study.known.world import FactChanges, World
from writesae_study.verdict.statistics import estimate

READ_PAIRS = (4, 8)
"""Pairs that the texts tell whose states are read."""
COLUMNS = {
    "": "recall",
    ", number unknown": "recall_above",
    ", precision": "precision_above",
    ", another text": "other",
}
"""Columns of the second table, for each of `READ_PAIRS`, and their fields of `ReadShares`."""


def board(
    name: str, seeds: int, sequences: int, facts: int, steps: int, brief: bool = False, only: str | None = None
) -> dict[str, Any]:
    """The first table of one model. `brief`: without attribution, and with the methods of `methods.BRIEF`; "example" is
    the first fact in words. `only`: the rows of one method."""
    world = World.of(name, sequences)
    drawn = FactChanges.draw(world, facts)
    heads = [fits(world, head, seeds, steps, brief, only) for head in range(len(world.keys))]
    rows = []
    for method in heads[0]:
        by_seed = zip(*(head[method] for head in heads))
        rows.append(scored(method, [list(codes) for codes in by_seed], world, drawn))
    found = {
        "model": name,
        "rows": rows,
        "plain": {name: float(right.float().mean()) for name, right in drawn.ask(world, None).items()},
        "example": in_words(world, drawn),
    }
    if not brief and only is None:
        found["attribution"] = attributed(world)
    return found


def readings(name: str, seeds: int, sequences: int, facts: int, steps: int) -> dict[str, Any]:
    """The second table of one model.

    Args:
        sequences: whose writes those readers are fitted to that know writes.
        facts: texts of each size that are read.
    """
    world = World.of(name, sequences)
    fitted = Told.of(world, FITTED_PAIRS, readers.FITTED, seed=1)
    naming = Told.of(world, FITTED_PAIRS, readers.NAMING, seed=2)
    texts = {pairs: Told.of(world, pairs, facts, seed=2 + pairs) for pairs in READ_PAIRS}
    jobs = [ReaderJob(world, fitted, naming, steps, seed) for seed in range(seeds)]
    rows = [read_by(reader, fit, jobs[:1] if reader in FIXED else jobs, texts) for reader, fit in READERS.items()]
    learned, fit = next(iter(READERS.items()))
    for times in WRONG_SIZES:
        rows.append(read_by(f"{learned}, {times:g} times the atoms", fit, [replace(jobs[0], times=times)], texts))
    return {"model": name, "heads": len(world.holder.heads), "rows": rows}


def read_by(
    name: str, fit: Callable[[ReaderJob], Reader], jobs: Sequence[ReaderJob], texts: dict[int, Told]
) -> dict[str, Any]:
    """One row: shares with intervals over texts and fits."""
    fits = [fit(job) for job in jobs]
    row: dict[str, Any] = {"reader": name, "parameters": fits[0].numbers, "bits": fits[0].bits}
    if math.isnan(row["bits"]):
        row["bits"] = None
    for pairs, told in texts.items():
        reads = [ReadShares.of(reader, told) for reader in fits]
        text = torch.arange(len(told.facts))
        for what, column in COLUMNS.items():
            row[f"{pairs} pairs{what}"] = rate([(getattr(read, column), text) for read in reads])
    return row


def in_words(world: World, facts: FactChanges) -> list[str]:
    """The first sequence up to its question, its answer, and what the answer is to be."""
    asked = facts.base
    changed = facts.questions["changed"]
    text = asked.tokens[0, 1 : int(asked.positions[0, 0]) + 1].tolist()
    return [world.task.vocabulary[i] for i in (*text, *asked.answers[0], *changed.answers[0])]


def scored(method: str, codes: Sequence[Sequence[HeadCode]], world: World, facts: FactChanges) -> dict[str, Any]:
    """One row: means over heads, and rates with intervals over facts and seeds; codes [seeds][heads]."""
    parts = world.parts(world.value_symbols)
    every = [code for heads in codes for code in heads]
    of_key = [purity(code.key_atom, one_hot(world.key_symbols).float()) for code in every]
    of_value = [purity(code.value_atom, parts) for code in every]
    composed = bool((parts.sum(1) > 1).any())
    followed = [[features(code, world) for code in heads] if composed else [] for heads in codes]
    row: dict[str, Any] = {
        "method": method,
        "parameters": codes[0][0].parameters,
        "bits": codes[0][0].bits,
        "keys found": fmean(found for _, found in of_key),
        "values found": fmean(
            [share for heads in followed for share, _ in heads] if composed else [found for _, found in of_value]
        ),
        "key purity": fmean(pure for pure, _ in of_key),
        "value purity": fmean(pure for pure, _ in of_value),
    }
    answers: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for heads, own in zip(codes, followed):
        writes, known = facts.writes(world, heads, [vectors for _, vectors in own])
        for name, right in facts.ask(world, writes).items():
            answers.setdefault(name, []).append((right[known].float(), known.nonzero()[:, 0]))
    return row | {name: rate(by_seed) for name, by_seed in answers.items()}


def rate(by_seed: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float | None]:
    """The share of right answers [n] to facts [n] of several seeds, with its interval over facts and seeds."""
    right = torch.cat([right for right, _ in by_seed])
    fact = torch.cat([fact.float() for _, fact in by_seed])
    seed = [n for n, (own, _) in enumerate(by_seed) for _ in own]
    found = estimate(right, fact, seed)
    ends = {"mean": found.mean, "low": found.low, "high": found.high}
    return {name: None if math.isnan(x) else x for name, x in ends.items()}
