"""From conditions to edits of the model, and from edited logits to the metrics of the test."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hookpoints import WriteEdit
from sae_lens_writesae.conditions import Condition, Factors, scaled
from sae_lens_writesae.divergence import divergences
from sae_lens_writesae.firings import HeadHook
from sae_lens_writesae.substitution_config import SubstitutionConfig
from sae_lens_writesae.substitution_result import METRICS

_SPREAD = 2
"""Longest stretch of one batch, in windows: rows at distant positions share no work, each is run over all of it."""

_CPU_TOKENS = 4096
"""Tokens of one batch on a CPU: runs to the end were 2.5 times slower at 40,000, which no cache holds."""


class _Row(NamedTuple):
    """One forward pass: one condition of one firing."""

    condition: int
    firing: int
    position: int
    to_end: bool  # run on to the last token
    edit: WriteEdit


def edits_of(
    hook: HeadHook, config: SubstitutionConfig, condition: Condition, native: Factors, positions: Sequence[int]
) -> list[WriteEdit]:
    """The edit of every firing under one condition.

    An additive write is replaced (or deleted) and its erase stays. A corrected write k u~^T contains its
    erase, so the edit adds the difference (condition - native) to the state instead.
    """
    written = condition.written
    if config.write == "corrected":
        gone = scaled(native, torch.full_like(native.values[:, 0, 0], -1))
        written = (
            gone
            if written is None
            else Factors(torch.cat([written.keys, gone.keys], 1), torch.cat([written.values, gone.values], 1))
        )
    mode = "add" if config.write == "corrected" else "replace"
    at = [(hook.layer, hook.head, t) for t in positions]
    if written is None:
        return [WriteEdit(*place, mode="delete") for place in at]
    return [WriteEdit(*place, written.keys[n], written.values[n], mode=mode) for n, place in enumerate(at)]


def measure(
    session: Any,
    edits: Sequence[Sequence[WriteEdit]],
    positions: Sequence[int],
    to_end: Sequence[bool],
    config: SubstitutionConfig,
) -> NDArray[np.float64]:
    """Run `edits` [C][N] and measure each row: [C,N,M] in the order of METRICS.

    Firings with `to_end` are run to the last token; for the others the metrics there are NaN. Rows go in
    batches in order of position, because a batch starts at its first edit and the session keeps the prefix
    for later ones.
    """
    firings = list(enumerate(zip(positions, to_end, strict=True)))
    rows = [_Row(c, n, t, end, edits[c][n]) for c in range(len(edits)) for n, (t, end) in firings]
    result = np.full((len(edits), len(positions), len(METRICS)), np.nan)
    for batch in _batches(rows, session.logits, config):
        for row, values in zip(batch, _measure_batch(session, batch, config)):
            result[row.condition, row.firing] = values
    return result


def _measure_batch(session: Any, batch: list[_Row], config: SubstitutionConfig) -> NDArray[np.float64]:
    """Metrics [n,M] of a batch of one kind, in one call of the session."""
    to_end, window = batch[0].to_end, config.horizon + 1
    stop = None if to_end else batch[-1].position + window
    run = session.run([row.edit for row in batch], stop=stop, batch_size=len(batch))
    looked_at = torch.tensor([row.position for row in batch])[:, None] + torch.arange(window)
    if to_end:
        looked_at = torch.cat([looked_at, torch.full((len(batch), 1), session.logits.shape[1] - 1)], 1)
    looked_at = looked_at.to(run.logits.device)
    each = torch.arange(len(batch), device=looked_at.device)[:, None]
    found = divergences(session.logits[0], looked_at, run.logits[each, looked_at - run.start])
    values = {}
    for prefix, kl in (("kl", found.forward), ("reverse_kl", found.reverse)):
        values[f"{prefix}_at"], values[f"{prefix}_next"] = kl[:, 0], kl[:, 1]
        values[f"{prefix}_window"] = kl[:, :window].mean(1)
        values[f"{prefix}_last"] = kl[:, -1] if to_end else torch.full_like(kl[:, 0], torch.nan)
    return torch.stack([values[name] for name in METRICS], 1).numpy()


def _batches(rows: list[_Row], logits: Tensor, config: SubstitutionConfig) -> list[list[_Row]]:
    """Rows in order of position, as many at once as the configuration allows; those run to the end by themselves.

    `logits` [1,T,D] are those of the plain pass.
    """
    _, n_positions, vocabulary = logits.shape
    room = config.logit_megabytes * 250_000 // vocabulary  # float32 logits, in tokens
    if logits.device.type == "cpu":
        room = min(room, _CPU_TOKENS)
    batches: list[list[_Row]] = []
    for row in sorted(rows, key=lambda row: (row.to_end, row.position)):
        batch = batches[-1] if batches else [row]
        stop = n_positions if row.to_end else row.position + config.horizon + 1
        length = stop - batch[0].position
        near = row.to_end or length <= _SPREAD * (config.horizon + 1)
        fits = len(batch) < min(config.rows_per_run, room // length)
        if batches and fits and near and batch[0].to_end == row.to_end:
            batch.append(row)
        else:
            batches.append([row])
    return sorted(batches, key=lambda batch: batch[0].position)
