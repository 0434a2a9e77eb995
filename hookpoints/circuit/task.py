"""The circuit of a task: graphs of texts of one form, averaged by role of the token, and tried on texts held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import pandas as pd
from torch import Tensor

from hookpoints.circuit.graph import Graph
from hookpoints.circuit.nodes import Token
from hookpoints.circuit.tables import by_size, random_orders
from hookpoints.errors import InputError

_PLACE = ["role", "layer", "head"]


class Pair(NamedTuple):
    """One case of a task: a text, another of as many tokens, and what is to be said after each."""

    text: str | Tensor
    corrupt: str | Tensor
    target: Token
    against: Token


class Case(NamedTuple):
    """One text of a task."""

    graph: Graph
    writes: pd.DataFrame
    """Rows of its nodes, with columns ``role`` and ``effect``: measured, or else predicted."""

    def kept(self, circuits: Sequence[pd.DataFrame]) -> list[float]:
        """Share of the effect of all writes that those of each circuit (role, layer, head) have alone."""
        kept = [self.writes.merge(circuit[_PLACE], on=_PLACE).node_id for circuit in circuits]
        shares, _ = self.graph.shares_without([self.writes[~self.writes.node_id.isin(ids)] for ids in kept])
        return shares


@dataclass(frozen=True, eq=False)
class Task:
    """What texts of one form have in common: the writes that matter in all of them."""

    effects: pd.DataFrame
    """A row for each role, layer and head: ``effect``, the mean over texts of what the metric loses where the write is
    replaced by that of the corrupt text, and ``spread``, the standard deviation. Largest |effect| first."""
    cases: Sequence[Case]

    def faithful(self, held_out: Task, sizes: Sequence[int] = (1, 2, 4, 8, 16)) -> pd.DataFrame:
        """How much the largest writes of these texts keep in texts that they were not chosen from.

        Returns: a row for each size: ``n``, ``kept`` (median over the held-out texts of the share of the effect of all
        writes: 1 as the model, 0 as with all writes of the corrupt text), ``low`` and ``high`` (least and largest), and
        ``random`` and ``random_high`` (median and largest of five random circuits of as many writes in each text).

        Raises:
            InputError: the texts have other roles.

        Cost: six passes for each text and size, and one for each text.
        """
        ours, theirs = ({*task.effects.role} for task in (self, held_out))
        if ours != theirs:
            raise InputError(f"held_out: expected roles {sorted(ours)}, got {sorted(theirs)}; name them with roles=")
        circuits = [self.effects[:n] for n in sizes]
        kept = np.array([case.kept(circuits) for case in held_out.cases])
        draws = [order[:n] for n in sizes for order in random_orders(self.effects)]
        random = np.array([case.kept(draws) for case in held_out.cases]).reshape(len(kept), len(circuits), -1)
        columns = {"n": list(sizes), "kept": np.median(kept, 0), "low": kept.min(0), "high": kept.max(0)}
        return pd.DataFrame(columns | {"random": np.median(random, (0, 2)), "random_high": random.max((0, 2))})


def case_of(graph: Graph, names: Sequence[str]) -> Case:
    """A text whose tokens have these roles."""
    length = len(cast(Sequence[str], graph.metadata["tokens"]))
    if len(names) != length:
        raise InputError(f"roles: expected {length} of {graph.metadata['title']}, a token each, got {len(names)}")
    writes = graph.nodes[graph.nodes.feature_type == "write"]
    role = writes.position.map(dict(enumerate(names)))
    return Case(graph, writes.assign(role=role, effect=writes.measured.fillna(writes.predicted)))


def task_of(cases: Sequence[Case]) -> Task:
    """What several texts have in common."""
    if len({frozenset(case.writes.role) for case in cases}) != 1:
        counts = sorted({case.writes.role.nunique() for case in cases}) or "no"
        raise InputError(f"pairs: expected texts of the same roles, got {counts} roles; name them with roles=")
    found = pd.concat([case.writes for case in cases]).groupby(_PLACE, sort=False).effect
    effects = pd.DataFrame({"effect": found.mean(), "spread": found.std()}).reset_index()
    return Task(effects.loc[by_size(effects.effect)].reset_index(drop=True), cases)
