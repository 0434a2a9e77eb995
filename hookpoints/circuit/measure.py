"""Runs of one text that differ in a few values, and what they take off a metric."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain, groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hookpoints.circuit.nodes import LogitMetric
from hookpoints.circuit.tables import Change

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint

    from hookpoints.edits.session import EditSession

_ROWS = 128
_ROOM = 2**26
"""Logits of runs at once."""
_TOKENS = 2**11
"""Tokens of runs at once."""
_PAST = 2**14
"""Tokens of the texts of runs at once, each of which has its own memory."""


class Wanted(NamedTuple):
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

    def __init__(self, session: EditSession, wanted: Wanted):
        self.session = session
        self.wanted = wanted
        self.plain = float(wanted.metric(self.session.logits))
        self.runs = 0
        """Runs so far."""

    def effects(self, changes: Sequence[Change]) -> np.ndarray:
        """[N], what each change takes off the metric."""
        batches = list(self._layer_batches(changes))
        order = list(chain.from_iterable(batches))
        device = self.session.tokens.device
        places = torch.tensor([(changes[row].position, changes[row].head) for row in order], device=device)
        parts = places.reshape(-1, 2).split(list(map(len, batches)))
        left = [self._metrics_without([changes[row] for row in rows], part) for rows, part in zip(batches, parts)]
        effects = np.zeros(len(changes))
        effects[order] = self.plain - np.array(torch.cat(left).tolist() if left else [])
        self.runs += len(changes)
        return effects

    def _layer_batches(self, changes: Sequence[Change]) -> list[list[int]]:
        """Rows that run together: of one block and near positions; those of the same hooks one after another."""
        length = self.session.tokens.shape[1]
        room = _TOKENS if self.wanted.last else min(_TOKENS, _ROOM // self.session.logits.shape[-1])
        most = max(1, min(_ROWS, _PAST // length))
        order = sorted(range(len(changes)), key=lambda row: changes[row][:2])
        batches = []
        for _, rows_of_layer in groupby(order, key=lambda row: changes[row].layer):
            rows = list(rows_of_layer)
            positions = [changes[row].position for row in rows]
            for batch in self.session.batches(positions, length, most, room=room):
                batches.append(sorted((rows[index] for index in batch), key=lambda row: [*changes[row].values]))
        return batches

    def _metrics_without(self, changes: Sequence[Change], places: Tensor) -> Tensor:
        """[N], of runs of changes of one layer, at ``places`` [N,2] (token, head)."""
        length = self.session.tokens.shape[1]
        hooks = []
        first = 0
        for names, group in groupby(changes, key=lambda change: [*change.values]):
            alike = list(group)
            rows = slice(first, first + len(alike))
            at = places[rows].T if alike[0].head >= 0 else places[rows, :1].T
            for name in names:
                values = torch.stack([change.values[name] for change in alike])
                hooks.append((name, partial(_with_values, rows=rows, at=at, length=length, values=values)))
            first = rows.stop
        start = min(change.position for change in changes)
        run = self.session.run_hooked(len(changes), changes[0].layer, start, hooks)
        return self.wanted.of_rows(run.logits, self.session.logits[0, : run.start])


def _with_values(x: Tensor, hook: HookPoint, *, rows: slice, at: Tensor, length: int, values: Tensor) -> Tensor:
    """``x`` [N,T',...], of the last of ``length`` tokens, with one of ``values`` in each of ``rows``, ``at`` tokens
    and perhaps heads [1 or 2,N']."""
    left = x.clone()
    token, *head = at
    index = torch.arange(len(values), device=x.device)
    left[rows][index, token - (length - x.shape[1]), *head] = values.to(x)
    return left
