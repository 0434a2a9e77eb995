"""The real change of logits, by edits of the model in closed loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hookpoints import WriteEdit
from sae_lens_writesae.conditions import Factors
from sae_lens_writesae.logit_change.config import LogitChangeConfig
from sae_lens_writesae.logit_change.targets import Targets

_CPU_TOKENS = 4096
"""Tokens of one batch on a CPU, as in the substitution test: more do not fit its cache."""


class Measured(NamedTuple):
    """Changes against the unedited run of the same batch: [n,E,Z,G] (firings, eps, horizons, rank groups)."""

    logit: NDArray[np.float64]
    log_prob: NDArray[np.float64]
    floor: NDArray[np.float64]
    """[n,Z,G] |logit of the unedited run - logit of the plain pass|: what arithmetic alone moves."""


def measure(
    session: Any,
    place: tuple[int, int],
    starts: Sequence[int],
    added: Factors,
    targets: Targets,
    config: LogitChangeConfig,
) -> Measured:
    """Add eps times each of the n matrices `added` (in units of eps) to the write at its start, and see.

    Args:
        place: layer and head.

    Cost: one row of max(horizons) + 1 tokens per firing and eps, from the edited layer up, and one unedited row per
    batch, so that both sides of a difference come from one arithmetic.
    """
    n, sizes = len(starts), config.eps
    shape = (n, len(sizes), *targets.tokens.shape[1:])
    logit, log_prob, floor = np.empty(shape), np.empty(shape), np.empty((n, *shape[2:]))
    for batch in _batches(starts, session.logits, config):
        rows = [
            WriteEdit(*place, starts[i], added.keys[i], added.values[i] * size, mode="add")
            for i in batch
            for size in sizes
        ]
        stop = int(targets.positions[batch].max()) + 1
        run = session.run([*rows, []], stop=stop, batch_size=len(rows) + 1)
        for k, i in enumerate(batch):
            at = torch.tensor(targets.positions[i], device=run.logits.device)
            tokens = torch.tensor(targets.tokens[i], device=run.logits.device)
            own = slice(k * len(sizes), (k + 1) * len(sizes))
            edited = _at(torch.cat([run.logits[own], run.logits[-1:]]), at - run.start, tokens)
            plain = _at(session.logits, at, tokens)
            logit[i] = (edited.logit[:-1] - edited.logit[-1]).cpu().numpy()
            log_prob[i] = (edited.log_prob[:-1] - edited.log_prob[-1]).cpu().numpy()
            floor[i] = (edited.logit[-1] - plain.logit[0]).abs().cpu().numpy()
    return Measured(logit, log_prob, floor)


class _Looked(NamedTuple):
    logit: Tensor  # [rows,Z,G]
    log_prob: Tensor


def _at(logits: Tensor, positions: Tensor, tokens: Tensor) -> _Looked:
    """Chosen tokens [Z,G] at `positions` [Z] of every row."""
    there = logits[:, positions]
    there = there if there.dtype == torch.float64 else there.float()
    chosen = there.gather(-1, tokens.expand(len(there), -1, -1))
    return _Looked(chosen.double(), chosen.double() - there.logsumexp(-1, keepdim=True).double())


def _batches(starts: Sequence[int], logits: Tensor, config: LogitChangeConfig) -> list[list[int]]:
    """Firings in order of position, as many at once as the configuration allows; those of one batch are near each
    other, since every row is run over the whole stretch of the batch."""
    window, per_firing = max(config.horizons) + 1, len(config.eps)
    room = config.logit_megabytes * 250_000 // logits.shape[-1]  # float32 logits, in tokens
    if logits.device.type == "cpu":
        room = min(room, _CPU_TOKENS)
    batches: list[list[int]] = []
    for i in sorted(range(len(starts)), key=lambda i: starts[i]):
        batch = batches[-1] if batches else []
        length = starts[i] + window - starts[batch[0]] if batch else window
        rows = (len(batch) + 1) * per_firing + 1
        if batch and length <= 2 * window and rows <= config.rows_per_run and rows * length <= room:
            batch.append(i)
        else:
            batches.append([i])
    return batches
