"""SAELens' trainer on rows that are at hand: matrices [N,K*V], and behind them the columns that a loss compares with.

Random numbers follow from the seed of a config, and the caller's stay as they are. `sae.fast` trains on factors.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
import wandb
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from hookpoints.scopes import threads_for
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.files import named_errors
from sae_lens_writesae.sae.metric import Metric
from sae_lens_writesae.sae.target import RunnerConfig
from sae_lens_writesae.sae.training import MatrixTrainingSAE

COLUMN_SCALE = 1e-6
"""Factor of the columns behind a matrix. SAELens takes its scaling factor from the norms of whole rows, to which they
must add nothing; the losses do not depend on it."""

Report = Callable[[int, dict[str, Tensor]], None]
"""Is told the step and what was measured in it, one number for each dictionary [M]."""


def new_sae(cfg: RunnerConfig) -> MatrixTrainingSAE:
    """The untrained dictionary of a runner config and its seed, with what SAELens' runner writes into its metadata."""
    sae_class, config_class = get_sae_training_class(cfg.sae.architecture())
    fields = cast(Any, config_class).from_dict(cfg.get_training_sae_cfg_dict())
    with seeded(cfg.seed, -1):
        sae = cast(MatrixTrainingSAE, sae_class(dataclasses.replace(fields, device=cfg.device)))
    metadata = sae.cfg.metadata
    for name in ("dataset_path", "hook_name", "model_name", "model_class_name", "context_size", "seqpos_slice"):
        setattr(metadata, name, getattr(cfg, name))
    metadata.model_from_pretrained_kwargs = cfg.model_from_pretrained_kwargs
    metadata.prepend_bos = cfg.prepend_bos
    return sae


def seeded(seed: int, step: int) -> ExitStack:
    """A scope with random numbers of its own, which follow from a seed and a step: a run that goes on has those of one
    that never stopped."""
    scope = ExitStack()
    scope.enter_context(torch.random.fork_rng())
    torch.manual_seed(mixed(seed, step))
    return scope


def mixed(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step + 1) % 2**63


class Shuffled:
    """Batches of row numbers without end. Every epoch is a new permutation of N rows, and a batch may reach from one
    epoch into the next, so that all rows are seen equally often."""

    def __init__(self, n_rows: int, batch: int, seed: int):
        self.n_rows, self.batch, self.seed = n_rows, batch, seed
        self._epoch, self._order = -1, torch.zeros(0, dtype=torch.long)

    def __call__(self, step: int) -> Tensor:
        """[batch] rows of a step."""
        parts: list[Tensor] = []
        start, left = step * self.batch, self.batch
        while left:
            epoch, offset = divmod(start, self.n_rows)
            if epoch != self._epoch:
                generator = torch.Generator().manual_seed(mixed(self.seed, epoch))
                self._epoch, self._order = epoch, torch.randperm(self.n_rows, generator=generator)
            parts.append(self._order[offset : offset + left])
            start, left = start + len(parts[-1]), left - len(parts[-1])
        return torch.cat(parts)


def train_on_rows(
    cfg: RunnerConfig,
    rows: Iterator[Tensor],
    metric: Metric | None = None,
    report: Report | None = None,
    checkpoint: Path | None = None,
) -> MatrixTrainingSAE:
    """Train by SAELens' trainer on batches of rows [N,K*V + columns], with the random numbers of the seed. The folder
    `checkpoint` is written at each twentieth of the run; the same call goes on from it, on other rows."""
    trainer = SAETrainer(cfg.to_sae_trainer_config(), new_sae(cfg), rows)
    if checkpoint is not None:
        total = trainer.cfg.total_training_samples
        trainer.checkpoint_thresholds = [total * part // 20 for part in range(1, 20)]
        trainer.save_checkpoint = functools.partial(_keep, trainer, checkpoint)
        if checkpoint.is_dir():
            trainer.sae.load_weights_from_checkpoint(checkpoint)
            trainer.load_trainer_state(checkpoint)
            trainer.n_training_steps += 1  # SAELens saves before it counts the step
            passed = trainer.n_training_samples
            trainer.checkpoint_thresholds = [each for each in trainer.checkpoint_thresholds if each > passed]
    if metric is not None:
        trainer.sae.in_metric = True
        trainer.data_provider = map(metric.apply_rows, rows)
    step = trainer.step

    def reported(batch: Tensor) -> Any:
        output = step(batch)
        if report is not None:
            report(trainer.n_training_steps, {name: torch.as_tensor([value]) for name, value in output.losses.items()})
        return output

    trainer.step = reported
    size = cfg.train_batch_size_tokens * cfg.sae.d_sae * cfg.sae.d_in
    with seeded(cfg.seed, trainer.n_training_steps), Logs([cfg]), threads_for(size):
        trainer.fit()
    if checkpoint is not None:
        shutil.rmtree(checkpoint, ignore_errors=True)
    return trainer.sae if metric is None else metric.fold(trainer.sae)


def _keep(trainer: SAETrainer[Any, Any], folder: Path, *args: object, **kwargs: object) -> None:
    """A checkpoint in `folder`, which is whole or absent."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with named_errors(folder), tempfile.TemporaryDirectory(dir=folder.parent, prefix=".checkpoint") as aside:
        SAETrainer.save_checkpoint(trainer, "whole", base_path=aside)
        shutil.rmtree(folder, ignore_errors=True)
        (Path(aside) / "whole").rename(folder)


def matrices(cfg: RunnerConfig, writes: LowRank) -> Iterator[Tensor]:
    """Shuffled batches of writes as rows [N,K*V], and behind them their factors, where the loss compares with these."""
    rows, step, columns = Shuffled(len(writes), cfg.train_batch_size_tokens, cfg.seed), 0, cfg.sae.loss == "write"
    while True:
        part = writes.rows(rows(step).to(writes.keys.device))
        part, step = part.to(torch.promote_types(part.keys.dtype, torch.float32)), step + 1
        sides = [COLUMN_SCALE * side.flatten(1) for side in (part.keys, part.values)] if columns else []
        yield torch.cat([part.dense().flatten(1), *sides], dim=1)


class Logs(ExitStack):
    """Runs at Weights & Biases, one for each config that asks for one, as SAELens' runner opens them."""

    def __init__(self, configs: Sequence[RunnerConfig]):
        super().__init__()
        self.runs: dict[int, Any] = {}
        for m, cfg in enumerate(configs):
            if (log := cfg.logger).log_to_wandb:
                fields = {"project": log.wandb_project, "name": log.run_name, "id": log.wandb_id}
                several: Any = {"reinit": "create_new"} if len(configs) > 1 else {}
                self.runs[m] = self.enter_context(wandb.init(config=cfg.to_dict(), **fields, **several))
