"""Runs of one text that differ in a few values, and what they take off a metric."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain, groupby
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hookpoints.circuit.nodes import LogitMetric
from hookpoints.circuit.tables import Change

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint

    from hookpoints.edits.session import EditedRun, EditSession
    from hookpoints.hooks.guard import HookSpecs

    Watch = AbstractContextManager[HookSpecs]

_ROWS = 128
_ROOM = 2**26
"""Logits of runs at once."""
_TOKENS = 2**11
"""Tokens of runs at once."""
_PAST = 2**14
"""Tokens of the texts of runs at once, each of which has its own memory."""


class LogitObjective(NamedTuple):
    """What is explained."""

    metric: LogitMetric
    """With targets it takes logits of several rows."""
    targets: tuple[int, ...] = ()
    against: tuple[int, ...] = ()

    @property
    def last(self) -> bool:
        """Whether logits after the last token alone are asked for."""
        return bool(self.targets)

    def of_rows(self, logits: Tensor, before: Tensor) -> Tensor:
        """[N], the metric of logits [N,T',vocab] that follow those ``before`` [T-T',vocab]."""
        if self.last:
            return self.metric(logits)
        return torch.stack([self.metric(torch.cat([before, row])[None]).reshape(()) for row in logits])


class Measure:
    """The plain pass of one text, kept, so that each other run costs only what differs.

    Args:
        session: of the text; its logits may be the last alone where these are all that the metric depends on.
    """

    def __init__(self, session: EditSession, objective: LogitObjective):
        self.session = session
        self.objective = objective
        self.plain = float(objective.metric(self.session.logits))
        self.runs = 0
        """Runs so far."""

    def effects(self, changes: Sequence[Change]) -> np.ndarray:
        """[N], what each change takes off the metric."""
        metrics = self.outcomes([[change] for change in changes], self.metrics_of)
        return self.plain - np.array(metrics.tolist(), float)  # the host waits once, after all runs

    def outcomes(self, rows: Sequence[Sequence[Change]], outcome: Callable[[EditedRun], Tensor]) -> Tensor:
        """[N,...], the ``outcome`` [N',...] of runs, each with some changes at once."""
        if not rows:
            return torch.empty(0)
        order: list[int] = []
        outcomes: list[Tensor] = []
        for batch, run in self.runs_of(rows):
            order += batch
            outcomes.append(outcome(run))
        joined = torch.cat(outcomes)
        return joined[torch.tensor(np.argsort(order), device=joined.device)]

    def metrics_of(self, run: EditedRun) -> Tensor:
        """[N], of the rows of a run."""
        return self.objective.of_rows(run.logits, self.session.logits[0, : run.start])

    def runs_of(
        self, rows: Sequence[Sequence[Change]], watched: Callable[[list[int]], Watch] | None = None
    ) -> Iterator[tuple[list[int], EditedRun]]:
        """The runs, and the numbers of the rows that each has.

        Args:
            watched: of these numbers, a scope in which the run has further hooks; its first row has no changes.
        """
        self.runs += len(rows)
        first = watched is not None
        length = self.session.tokens.shape[1]
        batches = self._near_rows(rows)
        placed: list[list[tuple[str, int, Change]]] = []
        for batch in batches:
            of_rows = ((number, change) for number, row in enumerate(batch, first) for change in rows[row])
            some = [(name, number, change) for number, change in of_rows for name in change.values]
            placed.append(sorted(some, key=itemgetter(0)))
        # The places of all changes go to the device in one copy.
        index = [(number, change.position, change.head) for _, number, change in chain.from_iterable(placed)]
        places = torch.tensor(index, dtype=torch.long, device=self.session.tokens.device).view(-1, 3)
        for batch, some in zip(batches, placed):
            hooks = []
            for name, group in groupby(some, key=itemgetter(0)):
                values = torch.stack([change.values[name] for _, _, change in group])
                here, places = places.tensor_split([len(values)])
                hooks.append((name, partial(_with_values, places=here, length=length, values=values)))
            layer, start = map(min, zip(*(self._first_change(rows[row]) for row in batch)))
            with watched(batch) if watched else nullcontext([]) as further:
                run = self.session.run_hooked(first + len(batch), layer, start, [*hooks, *further])
            yield batch, run

    def _first_change(self, changes: Sequence[Change]) -> tuple[int, int]:
        """The lowest block and the first token at which a run has something else."""
        layer = min((change.layer for change in changes), default=0)
        return layer, min((change.position for change in changes), default=self.session.tokens.shape[1] - 1)

    def _near_rows(self, rows: Sequence[Sequence[Change]]) -> list[list[int]]:
        """Rows that run together: few, or those of one block and near tokens."""
        length = self.session.tokens.shape[1]
        room = _TOKENS if self.objective.last else min(_TOKENS, _ROOM // self.session.logits.shape[-1])
        most = max(1, min(_ROWS, _PAST // length))
        places = [self._first_change(changes) for changes in rows]
        order = sorted(range(len(rows)), key=lambda row: places[row])
        if 0 < len(rows) <= most and len(rows) * length <= room // 2:
            return [order]  # a further pass costs more than the blocks and tokens that it leaves out
        batches: list[list[int]] = []
        for _, alike in groupby(order, key=lambda row: places[row][0]):
            of_layer = list(alike)
            positions = [places[row][1] for row in of_layer]
            near = self.session.batches(positions, length, most, room=room)
            batches += [[of_layer[index] for index in batch] for batch in near]
        return batches


def _with_values(x: Tensor, hook: HookPoint, *, places: Tensor, length: int, values: Tensor) -> Tensor:
    """``x`` [N,T',...], of the last of ``length`` tokens, with ``values`` at ``places`` [N',3]: row, token, and head
    where values are of heads."""
    left = x.clone()
    row, token, head = places.to(x.device).T
    at = (row, token - (length - x.shape[1]), head)
    left[at[: x.ndim - values.ndim + 1]] = values.to(x)
    return left
