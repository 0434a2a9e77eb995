"""Equal terms: what a dictionary, its baselines and its nulls are built from, as one object.

A comparison is about a method only where all that is compared saw the same writes, in the same metric. `Terms` reads
both off one training text.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from sae_lens import SAE
from torch import Tensor

from hookpoints import HookedRecurrent
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae.factors import Collection
from sae_lens_writesae.sae.metric import DAMPING, Metric
from sae_lens_writesae.sae.metric_fit import fit_metrics
from sae_lens_writesae.sae.target import HeadHook
from writesae.experiment.firings import Integers, in_one_pass
from writesae.head.writes import head_writes, joined

if TYPE_CHECKING:
    from writesae_study.head.baselines import HeadBaselines


class Terms:
    """The text that everything of a comparison is fitted to, and what follows from it for each head.

    Writes and metrics are saved, so that dictionaries of one head share them.

    Args:
        model: the hooked model.
        text: [M,S] token ids, or a collection of the model's factors, whose writes are then read and not run.
    """

    def __init__(self, model: HookedRecurrent, text: Tensor | Collection):
        self.model, self._text = model, text
        self.tokens = text.tokens if isinstance(text, Collection) else text
        """[M,S]"""
        self.collection = text if isinstance(text, Collection) else None
        # Of this object and not of the class, whose cache would keep every text alive.
        self.writes = lru_cache(1)(self._head_writes)
        self.metric = lru_cache(16)(self._head_metric)
        self.fitted: dict[tuple[object, ...], HeadBaselines] = {}
        """What a laboratory fitted to this text, by head, seed and settings."""

    @torch.no_grad()
    def _head_writes(self, layer: int, head: int) -> LowRank:
        """The N = M S writes of a head. Cost: a forward up to the layer for each sequence, or of a collection none."""
        if isinstance(self._text, Collection):
            place = self.model.cfg.device, self.model.cfg.dtype
            keys, values = self._text.factors(layer, head)
            return LowRank(keys[:].to(*place), values[:].to(*place))
        writes = []
        for part in in_one_pass(self.tokens, self.model.cfg.device):
            recurrence = self.model.recurrence(self.tokens[part], layer)
            writes.append(head_writes(recurrence, head))
        return joined(writes)

    def _head_metric(self, layer: int, head: int, n_sequences: int = 64, damping: float = DAMPING) -> Metric:
        """The metric of a head's writes from the first sequences. Cost: as of `fit_metrics`."""
        return fit_metrics(self.model, self.tokens[:n_sequences], [(layer, head)], damping=damping)[layer, head]

    def metric_of(self, sae: SAE) -> Metric | None:
        """The metric that a dictionary was trained in, fitted again; None: squared errors."""
        about = sae.cfg.metadata
        hook = HeadHook.of(sae)
        if about.get("metric") != "gauss_newton":
            return None
        return self.metric(hook.layer, hook.head, about.metric_sequences, about.metric_damping)

    @cached_property
    def contexts(self) -> Integers:
        """[N,2] of each write the token before (-1 at the start of a sequence) and its own token."""
        return np.concatenate([tokens_and_before(row) for row in self.tokens])

    def unequal(self, sae: SAE) -> str:
        """Why baselines that are fitted to this text are at a disadvantage to a dictionary, or nothing."""
        rows = sae.cfg.metadata.get("n_training_rows")
        metric_sequences = sae.cfg.metadata.get("metric_sequences") or 0
        if rows is not None and rows <= self.tokens.numel() and metric_sequences <= len(self.tokens):
            return ""
        seen = "a number of writes that its metadata does not name" if rows is None else f"{rows:,} writes"
        return (
            f"The terms are not equal: the dictionary was fitted to {seen}, the baselines to {self.tokens.numel():,}. "
            "Name the collection that it was trained on."
        )


def tokens_and_before(tokens: Tensor) -> Integers:
    """[T,2] the token before (-1 at the start) and the token, of one sequence [T]."""
    ids = tokens.cpu().numpy().astype(np.int64)
    return np.stack([np.append(-1, ids[:-1]), ids], 1)
