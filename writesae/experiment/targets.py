"""Tokens to aim at, by their rank in the native prediction; the value directions that aim at them; what was hit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hookpoints import HookedRecurrent
from sae_lens_writesae.steering import value_direction
from writesae.experiment.lab import EditedRows, Lab
from writesae.experiment.tokens import special_tokens


class Stratum(NamedTuple):
    """Tokens that a target is drawn from: those of some native ranks, or a list."""

    name: str
    low: int = 1
    """First rank; rank 1 is the token that the model predicts."""
    high: int | None = None
    """Last rank, included; None: the end of the vocabulary."""
    among: tuple[int, ...] | None = None
    """A list of tokens, whatever their ranks."""


class DrawnTarget(NamedTuple):
    """A target, and a wrong target of the same stratum."""

    token: int
    rank: int
    """Native rank of `token`, from 1."""
    wrong: int


def ranks_of(logits: Tensor) -> Tensor:
    """Rank of every token, from 1, in logits [vocab]: [vocab], on the CPU."""
    ranks = torch.empty(len(logits), dtype=torch.long)
    ranks[logits.argsort(descending=True).cpu()] = torch.arange(1, len(logits) + 1)
    return ranks


def draw_target(
    model: HookedRecurrent, logits: Tensor, stratum: Stratum, rng: np.random.Generator
) -> DrawnTarget | None:
    """A uniform draw of a target and a wrong target from a stratum, by native logits [vocab].

    Special tokens are never drawn.

    Returns: None where the stratum has fewer than two tokens.
    """
    ranks = ranks_of(logits).numpy()
    if stratum.among is None:
        high = len(ranks) if stratum.high is None else stratum.high
        candidates = np.flatnonzero((ranks >= stratum.low) & (ranks <= high))
    else:
        candidates = np.array(sorted(set(stratum.among)))
    candidates = np.setdiff1d(candidates, list(special_tokens(model)))
    if len(candidates) < 2:
        return None
    token, wrong = rng.choice(candidates, 2, replace=False)
    return DrawnTarget(int(token), int(ranks[token]), int(wrong))


def token_directions(lab: Lab) -> Callable[[int], Tensor]:
    """`value_direction` [V] of a token through the head of `lab`; each token's is made once."""
    return cache(partial(value_direction, lab.model, lab.hook.layer, lab.hook.head))


def random_unit(like: Tensor, rng: np.random.Generator) -> Tensor:
    """A random direction of norm 1, of the shape and dtype of `like` [V]."""
    drawn = torch.tensor(rng.standard_normal(like.shape)).to(like)
    return drawn / drawn.norm()


def target_change(rows: EditedRows) -> Mapping[str, NDArray[np.float64]]:
    """Readout: how far the target of each trial (`row["token"]`) moves at the last token of the window.

    `logit`: change of its logit. `log_prob`: change of its log-probability, nats, in at least float32.
    """
    tokens = [cast(int, trial.row["token"]) for trial in rows.trials]
    target = torch.tensor(tokens, device=rows.logits.device)[:, None]
    edited, native = rows.window[:, -1], rows.native_window[:, -1]
    wide = torch.promote_types(edited.dtype, torch.float32)
    columns = {
        "logit": [side.gather(1, target) for side in (edited, native)],
        "log_prob": [side.to(wide).log_softmax(-1).gather(1, target) for side in (edited, native)],
    }
    return {name: (a.cpu().double() - b.cpu().double())[:, 0].numpy() for name, (a, b) in columns.items()}


def target_rank(rows: EditedRows) -> Mapping[str, NDArray[np.int64]]:
    """Readout: `edited_rank`, the rank from 1 of the target of each trial (`row["token"]`) at the last token of the
    window."""
    tokens = [cast(int, trial.row["token"]) for trial in rows.trials]
    edited = rows.window[:, -1]
    target = edited.gather(1, torch.tensor(tokens, device=edited.device)[:, None])
    return {"edited_rank": 1 + (edited > target).sum(1).cpu().numpy()}


def logit_noise(rows: EditedRows) -> Mapping[str, NDArray[np.float64]]:
    """Readout: `logit`, the root mean square over the vocabulary of the change of logits at the last token of the
    window. After a no-op, that is what rounding moves a logit by."""
    change = rows.window[:, -1].float() - rows.native_window[:, -1].float()
    return {"logit": change.square().mean(-1).sqrt().cpu().double().numpy()}
