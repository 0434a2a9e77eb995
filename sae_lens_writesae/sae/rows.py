"""SAELens' trainer on rows that are at hand: matrices [N,K*V], and behind them the columns that a loss compares with.

Random numbers follow from the seed of a config, and the caller's stay as they are. `sae.fast` trains on factors.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import wandb
from sae_lens import LanguageModelSAETrainingRunner
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from hookpoints.scopes import threads_for
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae.matrix import require
from sae_lens_writesae.sae.metric import Metric
from sae_lens_writesae.sae.target import RunnerConfig
from sae_lens_writesae.sae.training import MatrixTrainingSAE

COLUMN_SCALE = 1e-6
"""Factor of the columns behind a matrix. SAELens takes its scaling factor from the norms of whole rows, to which they
must add nothing; the losses do not depend on it."""


def new_sae(cfg: RunnerConfig, metric: Metric | None = None) -> MatrixTrainingSAE:
    """The untrained dictionary of a runner config and its seed, with what SAELens' runner writes into its metadata.

    Raises:
        ValueError: a metric, and a config that asks for none; or none where it asks for one.
    """
    require(
        (metric is None) == (cfg.sae.metric == "frobenius"),
        "metric",
        cfg.sae.metric,
        "frobenius, or given (see `fit_metrics`)",
    )
    with seeded(cfg.seed, -1):
        sae = cast(MatrixTrainingSAE, TrainingSAE.from_dict(cfg.get_training_sae_cfg_dict() | {"device": cfg.device}))
    LanguageModelSAETrainingRunner._set_sae_metadata(cast(Any, SimpleNamespace(cfg=cfg, sae=sae)))
    sae.in_metric = metric is not None
    return sae


@contextmanager
def seeded(seed: int, step: int) -> Iterator[None]:
    """A scope with its own random numbers, which follow from a seed and a step: a resumed run draws those of one
    that never stopped."""
    with torch.random.fork_rng():
        torch.manual_seed((seed * 1_000_003 + step + 1) % 2**63)
        yield


def shuffled(n_rows: int, batch: int, seed: int, step: int = 0) -> Iterator[Tensor]:
    """[batch] row numbers of a step and all later ones. Every epoch is a new permutation of N rows, and a batch may
    reach from one epoch into the next, so that all rows are seen equally often."""
    epoch, skipped = divmod(step * batch, n_rows)
    order = torch.zeros(0, dtype=torch.long)
    while True:
        while len(order) < batch + skipped:
            with seeded(seed, epoch):
                order = torch.cat([order, torch.randperm(n_rows)])
            epoch += 1
        yield order[skipped : skipped + batch]
        order, skipped = order[skipped + batch :], 0


def train_on_rows(
    cfg: RunnerConfig,
    rows: Iterator[Tensor],
    metric: Metric | None = None,
    checkpoint: Path | None = None,
    n_rows: int | None = None,
) -> MatrixTrainingSAE:
    """Train by SAELens' trainer on batches of rows [N,K*V + columns], with the random numbers of the seed. The folder
    `checkpoint` is written at each twentieth of the run; the same call resumes from it, on other rows.
    `n_rows`: how many different ones there are, for the metadata."""
    settings, sae = cfg.to_sae_trainer_config(), new_sae(cfg, metric)
    sae.cfg.metadata.n_training_rows = n_rows
    part = None if checkpoint is None else checkpoint.with_name(f".{checkpoint.name}.part")

    def keep(checkpoint_path: Path | None) -> None:  # whole or absent
        shutil.rmtree(cast(Path, checkpoint), ignore_errors=True)
        cast(Path, checkpoint_path).rename(cast(Path, checkpoint))

    if checkpoint is not None:
        settings = dataclasses.replace(settings, n_checkpoints=19, checkpoint_path=str(part))
    given = map(metric.apply_rows, rows) if metric else rows
    trainer = SAETrainer(settings, sae, given, save_checkpoint_fn=keep if part else None)
    if checkpoint is not None and checkpoint.is_dir():
        sae.load_weights_from_checkpoint(checkpoint)
        trainer.load_trainer_state(checkpoint)
        trainer.n_training_steps += 1  # SAELens saves before it counts the step
    with (
        seeded(cfg.seed, trainer.n_training_steps),
        wandb_run(cfg),
        threads_for(cfg.train_batch_size_tokens * cfg.sae.d_sae * cfg.sae.d_in),
    ):
        trainer.fit()
    for folder in filter(None, (checkpoint, part)):
        shutil.rmtree(folder, ignore_errors=True)
    return metric.fold(sae) if metric else sae


def matrices(cfg: RunnerConfig, writes: LowRank) -> Iterator[Tensor]:
    """Shuffled batches of writes as rows [N,K*V], and behind them the same again, where the loss compares with
    writes."""
    for index in shuffled(len(writes), cfg.train_batch_size_tokens, cfg.seed):
        part = writes.rows(index.to(writes.keys.device))
        rows = part.to(torch.promote_types(part.keys.dtype, torch.float32)).dense().flatten(1)
        yield torch.cat([rows, COLUMN_SCALE * rows], dim=1) if cfg.sae.loss == "write" else rows


def wandb_run(cfg: RunnerConfig, **options: Any) -> AbstractContextManager[Any]:
    """The run at Weights & Biases that SAELens' runner opens for a config that asks for one."""
    log = cfg.logger
    if not log.log_to_wandb:
        return nullcontext()
    names = {"project": log.wandb_project, "entity": log.wandb_entity, "name": log.run_name, "id": log.wandb_id}
    return wandb.init(config=cfg.to_dict(), **names, **options)
