"""Runs of one text that differ in a few values, and what they take off a metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hookpoints.circuit.nodes import LogitMetric
from hookpoints.circuit.tables import Change

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint

    from hookpoints.edits.session import EditSession

_ROWS = 64
_ROOM = 2**26
"""Logits of runs at once."""
_TOKENS = 2**11
"""Tokens of runs at once."""
_PAST = 2**14
"""Tokens of the texts of runs at once, each of which has its own memory."""


class Measure:
    """The plain pass of one text, kept, so that each other run costs only what differs.

    Args:
        session: of the text; its logits may be the last alone where these are all that the metric depends on.
    """

    def __init__(self, session: EditSession, metric: LogitMetric):
        self.session = session
        self.last = session.logits.shape[1] < session.tokens.shape[1]
        self.metric = metric
        self.plain = float(metric(self.session.logits))
        self.runs = 0
        """Runs so far."""

    def effects(self, changes: Sequence[Change]) -> np.ndarray:
        """[N], what each change takes off the metric."""
        effects = np.zeros(len(changes))
        length = self.session.tokens.shape[1]
        room = _TOKENS if self.last else min(_TOKENS, _ROOM // self.session.logits.shape[-1])
        most = max(1, min(_ROWS, _PAST // length))
        order = sorted(range(len(changes)), key=lambda row: changes[row][:2])
        for _, rows_of_layer in groupby(order, key=lambda row: changes[row].layer):
            rows = list(rows_of_layer)
            positions = [changes[row].position for row in rows]
            for batch in self.session.batches(positions, length, most, room=room):
                tried = [rows[index] for index in batch]
                effects[tried] = self._effects_of_layer([changes[row] for row in tried])
        return effects

    def _effects_of_layer(self, changes: Sequence[Change]) -> list[float]:
        """Of changes of one layer, ordered by position."""
        start = changes[0].position
        names = sorted({name for change in changes for name in change.values})
        length = self.session.tokens.shape[1]
        hooks = [(name, _hook_of_changes(changes, length)) for name in names]
        run = self.session.run_hooked(len(changes), changes[0].layer, start, hooks)
        before = self.session.logits[0, : run.start]
        self.runs += len(changes)
        rows = (logits if self.last else torch.cat([before, logits]) for logits in run.logits)
        values = torch.stack([self.metric(row[None]).reshape(()) for row in rows])
        return (self.plain - values).tolist()


def _hook_of_changes(changes: Sequence[Change], length: int) -> Callable[[Tensor, HookPoint], Tensor]:
    """A hook that gives each row its value at its token, of the last tokens of a text of ``length``."""

    def put(x: Tensor, hook: HookPoint) -> Tensor:
        x = x.clone()
        begin = length - x.shape[1]
        for row, change in enumerate(changes):
            value = change.values.get(str(hook.name))
            if value is not None:
                at = x[row, change.position - begin]
                at = at if change.head < 0 else at[change.head]
                at.copy_(value)
        return x

    return put
