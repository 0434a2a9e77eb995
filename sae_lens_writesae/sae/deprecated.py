"""Names of the version before `train` took all kinds of data. They go with the next one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae.metric import Metric
from sae_lens_writesae.sae.runner import train
from sae_lens_writesae.sae.target import RunnerConfig
from sae_lens_writesae.sae.training import MatrixTrainingSAE


def _warn_of_old(old: str, new: str) -> None:
    warnings.warn(f"{old} goes with the next version: use {new}", DeprecationWarning, stacklevel=3)


def train_on_writes(
    cfg: RunnerConfig, keys: Tensor, values: Tensor, *, metric: Metric | None = None, checkpoint: Path | None = None
) -> MatrixTrainingSAE:
    """`train` on writes of keys [N,S,K] and values [N,S,V], or [N,K] and [N,V]."""
    _warn_of_old(
        "train_on_writes(cfg, keys, values)", "train(cfg, LowRank(keys, values)), LowRank.rank_one for [N,K], [N,V]"
    )
    writes = LowRank.rank_one(keys, values) if keys.ndim == 2 else LowRank(keys, values)
    return train(cfg, writes, metric=metric, checkpoint=checkpoint)


def train_on_states(cfg: RunnerConfig, states: Tensor, *, checkpoint: Path | None = None) -> MatrixTrainingSAE:
    """`train` on matrices [N,K,V]."""
    _warn_of_old("train_on_states(cfg, states)", "train(cfg, states)")
    return train(cfg, states, checkpoint=checkpoint)


def train_many_on_writes(
    configs: Sequence[RunnerConfig],
    writes: Sequence[LowRank],
    metrics: Sequence[Metric | None] | None = None,
    *,
    checkpoint: Path | None = None,
) -> list[MatrixTrainingSAE]:
    """`train` of several configs."""
    _warn_of_old("train_many_on_writes(configs, writes, metrics)", "train(configs, writes, metric=metrics)")
    return train(configs, writes, metric=metrics, checkpoint=checkpoint)
