"""What the interventions share: halves of the sequences, rows of edits with their windows, estimates with intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from hookpoints import WriteEdit
from sae_lens_writesae.conditions import Factors
from sae_lens_writesae.errors import NothingToMeasureError
from sae_lens_writesae.evaluate import check_fits
from sae_lens_writesae.firings import HeadHook, atom_factors
from sae_lens_writesae.verdict import statistics as stats

FLOOR = 1e-5
"""Nats. Log-probabilities of float32 logits differ by that much between two ways of computing them."""

_CPU_TOKENS = 4096
"""Tokens of one batch on a CPU (see `substitution_edits`)."""
_STRETCH = 24
"""Tokens that a batch may always stretch over: a call costs as much as a few dozen tokens of a small model."""
_LOGIT_FLOATS = 128_000_000
"""Float32 logits of one batch: 512 MB."""


class Estimate(NamedTuple):
    """A mean with its cluster-bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int
    n_clusters: int

    def __str__(self) -> str:
        return f"{self.mean:+.3g} [{self.low:+.3g}, {self.high:+.3g}]"


class Window(NamedTuple):
    """Logits of some edited rows, each from its own position on."""

    rows: list[int]  # indices into what was asked for
    positions: Tensor  # [n,W]
    logits: Tensor  # [n,W,vocab]


def checked_hook(model: Any, sae: Any, tokens: Tensor, least: int) -> HeadHook:
    """The SAE's hook, if it fits the model and `tokens` are [N,T] with T >= `least`; else ValueError."""
    check_fits(model, sae, "sae=")
    check_tokens(tokens, least)
    return HeadHook.of(sae)


def check_tokens(tokens: Tensor, least: int) -> None:
    """Raise ValueError unless `tokens` are [N,T] with N >= 2 and T >= `least`."""
    if tokens.ndim != 2 or tokens.shape[1] < least or tokens.shape[0] < 2:
        raise ValueError(f"tokens must be [N,T] with N >= 2 and T >= {least}, found {list(tokens.shape)}")


def estimate(values: ArrayLike, clusters: ArrayLike, seed: int = 0) -> Estimate:
    """Mean and 95 % interval. Raises ValueError for a single cluster, which says nothing about others."""
    found = stats.cluster_bootstrap(values, clusters, seed=seed)
    if found.n_clusters < 2:
        raise NothingToMeasureError(f"an interval needs at least 2 clusters, found 1 with {found.n} values")
    return Estimate(found.estimate, *found.interval, found.n, found.n_clusters)


def estimate_over_atoms(values: ArrayLike, sequences: ArrayLike, atoms: ArrayLike, seed: int = 0) -> Estimate:
    """Mean and 95 % interval of firings that share sequences and atoms, for atoms drawn from a dictionary: both are
    resampled (`statistics.two_way_bootstrap`). With a single atom the interval is about that atom: over sequences."""
    if len(np.unique(np.asarray(atoms))) < 2:
        return estimate(values, sequences, seed)
    found = stats.two_way_bootstrap(values, sequences, atoms, seed=seed)
    if found.n_clusters < 2:
        raise NothingToMeasureError(f"an interval needs at least 2 sequences, found 1 with {found.n} values")
    return Estimate(found.estimate, *found.interval, found.n, found.n_clusters)


def head_atoms(model: Any, sae: Any, hook: HeadHook, atoms: Sequence[int] | NDArray[np.int64]) -> Factors:
    """Atoms of the SAE as factors, on the model's device."""
    shape = model.cfg.layer(hook.layer)
    found = atom_factors(sae, atoms, shape.K, shape.V)
    return Factors(found.keys.to(model.cfg.device), found.values.to(model.cfg.device))


def add_edit(hook: HeadHook, position: int, added: Factors, row: int = 0) -> WriteEdit:
    """An edit that adds matrix `row` of `added` to the head's write."""
    return WriteEdit(hook.layer, hook.head, position, added.keys[row], added.values[row])


def windows(
    session: Any, positions: Sequence[int], edits: Sequence[Any], window: int, rows_per_run: int = 256
) -> Iterator[Window]:
    """Run each row of edits from its position on for `window` tokens, many rows at a time; positions are the first
    edited ones. The session keeps prefixes, so rows go in order of position."""
    n_positions, vocabulary = session.logits.shape[1:]
    room = _LOGIT_FLOATS // vocabulary
    if session.logits.device.type == "cpu":
        room = min(room, _CPU_TOKENS)
    batch: list[int] = []
    order = sorted(range(len(positions)), key=lambda n: positions[n])
    for row, following in zip(order, [*order[1:], None]):
        batch.append(row)
        if following is not None:
            length = positions[following] + window - positions[batch[0]]
            if length <= max(2 * window, _STRETCH) and (len(batch) + 1) * length <= room and len(batch) < rows_per_run:
                continue
        yield _window(session, batch, positions, edits, min(window, n_positions - positions[batch[-1]]))
        batch = []


def _window(session: Any, batch: list[int], positions: Sequence[int], edits: Sequence[Any], window: int) -> Window:
    run = session.run([edits[n] for n in batch], stop=positions[batch[-1]] + window, batch_size=len(batch))
    at = torch.tensor([positions[n] for n in batch])[:, None] + torch.arange(window)
    at = at.to(run.logits.device)
    each = torch.arange(len(batch), device=at.device)[:, None]
    return Window(list(batch), at, run.logits[each, at - run.start])


def native_log_prob(session: Any, found: Window) -> Tensor:
    """Mean over the window of log p without edits: [n,vocab], float32."""
    return session.logits[0, found.positions].float().log_softmax(-1).mean(1)


def log_prob_change(session: Any, found: Window) -> Tensor:
    """Mean over the window of log p(edited) - log p(native): [n,vocab], float32."""
    return found.logits.float().log_softmax(-1).mean(1) - native_log_prob(session, found)


def token_text(model: Any, token: int) -> str:
    """A token as text, or its number where the model has no tokenizer."""
    return str(model.to_string(int(token))) if model.tokenizer is not None else f"#{token}"


def special_tokens(model: Any) -> set[int]:
    """Ids that text does not consist of: padding, begin and end."""
    ids: set[int] = set(getattr(model.tokenizer, "all_special_ids", None) or [])
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(model.hf_model.config, name, None)
        ids |= set(value) if isinstance(value, (list, tuple)) else {value} if value is not None else set()
    return ids


def sign_word(difference: Estimate) -> str:
    """ "above", "below" or "across" 0, by the interval."""
    return "above" if difference.low > 0 else "below" if difference.high < 0 else "across"


def check_at_least(config: Any, least: dict[str, float]) -> None:
    """Raise ValueError for a field below its least value, naming both."""
    for name, bound in least.items():
        value = getattr(config, name)
        if value is not None and value < bound:
            raise ValueError(f"{name} must be at least {bound}, found {value}")


def by_sequence(table: pd.DataFrame) -> list[tuple[int, pd.DataFrame]]:
    """The rows of each sequence, in order of sequences."""
    return [(int(cast(int, sequence)), part) for sequence, part in table.groupby("sequence")]


def column_table(rows: list[dict[str, Any]], columns: dict[str, str]) -> pd.DataFrame:
    """A table with the documented columns, in their order, also where there is no row."""
    return pd.DataFrame(rows, columns=list(columns))
