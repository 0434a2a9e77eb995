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

from hookpoints.circuit.tables import Change

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint

    from hookpoints.edits.session import EditedRun, EditSession
    from hookpoints.hooks.guard import HookSpecs

    Watch = AbstractContextManager[HookSpecs]

_ROWS = 128
_TOKENS = 2**11
"""Tokens of runs at once."""
_PAST = 2**14
"""Tokens of the texts of runs at once, each of which has its own memory."""


class LogitLead(NamedTuple):
    """What is explained: by how much the logits of some tokens lead those of others, after the last token."""

    targets: tuple[int, ...]
    against: tuple[int, ...]
    """None: all tokens."""

    def of(self, logits: Tensor) -> Tensor:
        """[N], the difference of the means, of logits [N,T,vocab]."""
        last = logits[:, -1]
        lead = torch.stack([last[:, index] for index in self.targets])  # a list of indices would be copied to a device
        compared = torch.stack([last[:, index] for index in self.against]) if self.against else last.T
        return lead.mean(0) - compared.mean(0)


class Measure:
    """The plain pass of one text, kept, so that each other run costs only what differs.

    Args:
        session: of the text; its logits may be the last alone.
    """

    def __init__(self, session: EditSession, lead: LogitLead):
        self.session = session
        self.lead = lead
        self.plain = float(lead.of(session.logits))
        self.runs = 0
        """Runs so far."""

    def effects(self, changes: Sequence[Change]) -> np.ndarray:
        """[N], what each change takes off the metric."""
        metrics = self.outcomes([[change] for change in changes], lambda run: self.lead.of(run.logits))
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
        most = max(1, min(_ROWS, _PAST // length))
        places = [self._first_change(changes) for changes in rows]
        order = sorted(range(len(rows)), key=lambda row: places[row])
        if 0 < len(rows) <= most and len(rows) * length <= _TOKENS // 2:
            return [order]  # a further pass costs more than the blocks and tokens that it leaves out
        batches: list[list[int]] = []
        for _, alike in groupby(order, key=lambda row: places[row][0]):
            of_layer = list(alike)
            positions = [places[row][1] for row in of_layer]
            near = self.session.batches(positions, length, most, room=_TOKENS)
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
