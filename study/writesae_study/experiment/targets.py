"""Tokens to aim at, by their rank in the native prediction, and how far the one that was aimed at moved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hookpoints import HookedRecurrent
from writesae.experiment.lab import EditedRows


class Stratum(NamedTuple):
    """Tokens that a target is drawn from: those of some native ranks, or a list."""

    name: str
    low: int = 1
    """First rank; rank 1 is the token that the model predicts."""
    high: float = float("inf")
    """Last rank, included."""
    among: tuple[int, ...] = ()
    """A list of tokens, whatever their ranks."""


class DrawnTarget(NamedTuple):
    """A target, and a wrong target of the same stratum."""

    token: int
    rank: int
    """Native rank of `token`, from 1."""
    wrong: int


def draw_target(
    model: HookedRecurrent, logits: Tensor, stratum: Stratum, rng: np.random.Generator
) -> DrawnTarget | None:
    """A uniform draw of a target and a wrong target from a stratum, by native logits [vocab].

    Special tokens are never drawn.

    Returns: None where the stratum has fewer than two tokens.
    """
    ranks = 1 + logits.argsort(descending=True).argsort().cpu().numpy()  # the inverse of an order is the ranks
    of_ranks = np.flatnonzero((ranks >= stratum.low) & (ranks <= stratum.high))
    candidates = np.setdiff1d(stratum.among or of_ranks, list(special_tokens(model)))
    if len(candidates) < 2:
        return None
    token, wrong = rng.choice(candidates, 2, replace=False)
    return DrawnTarget(int(token), int(ranks[token]), int(wrong))


def special_tokens(model: HookedRecurrent) -> set[int]:
    """Ids that text does not consist of: padding, begin and end."""
    config = model.hf_model.config
    fields = [getattr(config, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")]
    special: set[int] = set()
    for ids in (getattr(model.tokenizer, "all_special_ids", None), *fields):
        # A model may end at one of several tokens, or have none of a kind.
        several = ids if isinstance(ids, (list, tuple)) else [ids]
        special |= {token for token in several if token is not None}
    return special


def random_unit(like: Tensor, rng: np.random.Generator) -> Tensor:
    """A random direction of norm 1, of the shape and dtype of `like` [V]."""
    drawn = torch.tensor(rng.standard_normal(like.shape)).to(like)
    return torch.nn.functional.normalize(drawn, dim=0)


def target_change(rows: EditedRows) -> Mapping[str, NDArray[np.generic]]:
    """Readout: how far the target of each trial (`row["token"]`) moves at the last token of the window.

    `measured`: change of its logit. `log_prob_change`: change of its log-probability, nats, in at least float32.
    `edited_rank`: its rank, from 1, after the edit.
    """
    ids = [[cast(int, trial.row["token"])] for trial in rows.trials]
    target = torch.tensor(ids, device=rows.logits.device)  # [n,1]
    edited = rows.window[:, -1]
    native = rows.native_window[:, -1]
    wide = torch.promote_types(edited.dtype, torch.float32)

    def change(after: Tensor, before: Tensor) -> NDArray[np.generic]:
        """Of the target's number, in float64: the difference of two float32 numbers is exact there."""
        difference = after.gather(1, target).double() - before.gather(1, target).double()
        return difference[:, 0].cpu().numpy()

    ahead = edited > edited.gather(1, target)
    log_p_edited = edited.to(wide).log_softmax(-1)
    log_p_native = native.to(wide).log_softmax(-1)
    return {
        "measured": change(edited, native),
        "log_prob_change": change(log_p_edited, log_p_native),
        "edited_rank": 1 + ahead.sum(1).cpu().numpy(),
    }


def logit_noise(rows: EditedRows) -> Mapping[str, NDArray[np.float64]]:
    """Readout: `logit`, the root mean square over the vocabulary of the change of logits at the last token of the
    window. After a no-op, that is what rounding moves a logit by."""
    change = rows.window[:, -1].float() - rows.native_window[:, -1].float()
    return {"logit": change.square().mean(-1).sqrt().cpu().double().numpy()}
