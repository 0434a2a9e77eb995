"""Training on the factors of writes, with SAELens' trainer around it.

The data provider gives packed rows [N,R*(K+V)] (`sae.training.pack`) where SAELens' own gives matrices [N,K*V]. The
optimizer, schedules, checkpoints and logs are SAELens'; `on_factors` tells its trainer how packed rows are scaled and
what their explained variance is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import wandb
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from hookpoints.scopes import threads_for
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae.metric import Metric, put_in_metric
from sae_lens_writesae.sae.target import HeadHook, RunnerConfig
from sae_lens_writesae.sae.training import Code, MatrixTrainingSAE, batch_variance, pack, unpack

Trainer = SAETrainer[Any, Any]


def train_on_writes(
    cfg: RunnerConfig,
    keys: Tensor,
    values: Tensor,
    report: Callable[[Trainer, TrainStepOutput], None] | None = None,
    *,
    metric: Metric | None = None,
) -> MatrixTrainingSAE:
    """Train a dictionary on writes in memory, sum_r k_nr u_nr^T, and return it, still of its training class.

    The generator of `cfg.seed` draws initial atoms, the order of the rows and resampled atoms: the same seed gives
    bitwise the same dictionary (on one machine and number of threads), and torch's global generator is left alone. A
    step costs R*(K+V) operations per row and atom. Variants without factors on both sides get each batch built as
    matrices.

    Args:
        cfg: SAELens' runner config; `training_config` makes one for a head of a model. Its SAE, seed, device,
            `training_tokens` (rows seen, in as many epochs as that needs), batch size, optimizer, schedules,
            checkpoints and logger are used; its model and its text are not.
        keys, values: [N,R,K] and [N,R,V], or [N,K] and [N,V] for R = 1, of any float dtype; memory-mapped tensors are
            read batch by batch.
        report: called after each step with the trainer and what the step returned.
        metric: where `cfg.sae.metric` is `gauss_newton`, the metric of this head (`sae.metric_fit.fit_metrics`). The
            dictionary that is returned has it folded in.

    Raises:
        ValueError: a metric that the config cannot have, or none where it needs one; shapes that fit neither each other
            nor the config, fewer rows than a batch, NaN or infinite values.
    """
    keys, values = (side[:, None] if side.ndim == 2 else side for side in (keys, values))
    check_writes(cfg, keys, values, metric)
    device = torch.device(cfg.device)
    _keep_freed_memory()
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type=device.type):
        torch.manual_seed(cfg.seed)
        trainer = writes_trainer(cfg, LowRank(keys, values), metric)
        if report is not None:
            step = trainer.step

            def reported(batch: Tensor) -> TrainStepOutput:
                output = step(batch)
                report(trainer, output)
                return output

            trainer.step = reported
        with _logged(cfg), step_threads(trainer, keys[0].numel() + values[0].numel()):
            trainer.fit()
    return trainer.sae if metric is None else metric.fold(trainer.sae)


def writes_trainer(cfg: RunnerConfig, writes: LowRank, metric: Metric | None = None) -> Trainer:
    """SAELens' trainer with a new dictionary and the shuffled rows of writes. It draws from torch's generator."""
    writes = LowRank(writes.keys.detach(), writes.values.detach())
    rows = shuffled_rows(writes, cfg.train_batch_size_tokens, torch.Generator().manual_seed(cfg.seed))
    trainer = factor_trainer(cfg.to_sae_trainer_config(), new_sae(cfg), rows)
    if metric is not None:
        put_in_metric(trainer, metric)
    return trainer


def step_threads(trainer: Trainer, width: int, stacked: int = 1) -> AbstractContextManager[None]:
    """The threads of a training step on rows [N,width], of ``stacked`` dictionaries; see `hookpoints.scopes`."""
    cfg, rows = trainer.sae.cfg, stacked * trainer.cfg.train_batch_size_samples
    return threads_for(rows * cfg.d_sae * (width if width >= cfg.d_in or cfg.is_factored else cfg.d_in))


def check_writes(cfg: RunnerConfig, keys: Tensor, values: Tensor, metric: Metric | None) -> None:
    """Raise ValueError where `train_on_writes` could not train a dictionary."""
    check_metric(cfg, metric)
    if metric is None and getattr(cfg.sae, "metric", "frobenius") != "frobenius":
        raise ValueError("cfg.sae.metric='gauss_newton' needs a metric: give what sae.metric_fit.fit_metrics returns")
    batch_size, sae = cfg.train_batch_size_tokens, cfg.sae
    if keys.shape != (*values.shape[:-1], sae.d_k) or values.shape != (*keys.shape[:2], sae.d_v):
        raise ValueError(
            f"keys, values: expected [N,R,K] and [N,R,V] with K, V = {sae.d_k}, {sae.d_v} (d_k, d_v of cfg.sae), got "
            f"{list(keys.shape)} and {list(values.shape)}"
        )
    if len(keys) < batch_size:
        raise ValueError(
            f"{len(keys)} writes are fewer than one batch of train_batch_size_tokens={batch_size}; collect more, or "
            "make the batch smaller"
        )


def _keep_freed_memory() -> None:
    """Free a block just below 32 MiB, whereupon glibc keeps what is freed for the next step, up to twice that, and does
    not hand it back to the system. At N*F = 1 M a step otherwise spends a quarter of its time on page faults."""
    torch.empty(33_000_000, dtype=torch.uint8)


def check_metric(cfg: RunnerConfig, metric: Metric | None) -> None:
    """Raise ValueError where a runner config cannot have the metric that it or the caller asks for."""
    wanted = getattr(cfg.sae, "metric", "frobenius")
    if wanted == "frobenius":
        if metric is not None:
            raise ValueError("a metric was given, but cfg.sae.metric is 'frobenius': set it to 'gauss_newton'")
        return
    if HeadHook.parse(cfg.hook_name).target != "write":
        raise ValueError(
            f"metric={wanted!r} is one of writes, but the SAE is trained on {cfg.hook_name}; use target='write', or "
            "metric='frobenius'"
        )
    if cfg.from_pretrained_path is not None:
        raise ValueError(
            f"metric={wanted!r} trains on transformed writes, but the weights of from_pretrained_path are for writes "
            "themselves; start anew, or go on with metric='frobenius'"
        )


@contextmanager
def _logged(cfg: RunnerConfig) -> Iterator[None]:
    """The run at Weights & Biases, where the config asks for one, as SAELens' runner opens it."""
    log = cfg.logger
    if not log.log_to_wandb:
        yield
        return
    with wandb.init(project=log.wandb_project, config=cfg.to_dict(), name=log.run_name, id=log.wandb_id):
        yield


def new_sae(cfg: RunnerConfig) -> MatrixTrainingSAE:
    """An untrained dictionary for a runner config, with what SAELens' runner writes into its metadata."""
    sae_class, config_class = get_sae_training_class(cfg.sae.architecture())
    fields = cast(Any, config_class).from_dict(cfg.get_training_sae_cfg_dict())
    sae = cast(MatrixTrainingSAE, sae_class(dataclasses.replace(fields, device=cfg.device)))
    metadata = sae.cfg.metadata
    for name in ("dataset_path", "hook_name", "model_name", "model_class_name", "context_size", "seqpos_slice"):
        setattr(metadata, name, getattr(cfg, name))
    metadata.model_from_pretrained_kwargs = cfg.model_from_pretrained_kwargs
    metadata.prepend_bos = cfg.prepend_bos
    return sae


def shuffled_rows(writes: LowRank, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Packed batches [batch_size,R*(K+V)] without end. Every epoch is a new permutation of the rows, and a batch may
    reach from one epoch into the next, so that all rows are seen equally often."""
    order = torch.zeros(0, dtype=torch.long)
    while True:
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(writes), generator=generator)])
        index, order = order[:batch_size], order[batch_size:]
        index = index.to(writes.keys.device)
        rows = pack(LowRank(writes.keys.index_select(0, index), writes.values.index_select(0, index)))
        yield rows.to(torch.promote_types(rows.dtype, torch.float32))


def factor_trainer(cfg: SAETrainerConfig, sae: MatrixTrainingSAE, rows: Iterator[Tensor]) -> Trainer:
    """SAELens' trainer on packed rows."""
    trainer = SAETrainer(cfg, sae, cast(Any, rows))
    on_factors(trainer)
    return trainer


def on_factors(trainer: Trainer) -> None:
    """Let SAELens' trainer scale packed rows as the matrices that they stand for, and log their explained variance."""
    sae = cast(MatrixTrainingSAE, trainer.sae)
    trainer.activation_scaler = FactorScaler(trainer.activation_scaler.scaling_factor, None, sae.cfg.d_k, sae.cfg.d_v)
    if not trainer.optimizer.state:  # the state of a resumed run was made without it
        trainer.optimizer.param_groups[0]["fused"] = True
    build = trainer.build_train_step_log_dict

    def build_from_factors(output: TrainStepOutput, n_training_samples: int) -> dict[str, Any]:
        if isinstance(output.sae_out, Tensor):
            return build(output, n_training_samples)
        # SAELens computes three of the entries from dense tensors; they are replaced below.
        stand_in = output.loss.new_ones(len(output.feature_acts), 1)
        log = build(dataclasses.replace(output, sae_in=stand_in, sae_out=stand_in), n_training_samples)
        return log | explained_variance(sae, cast(LowRank, output.sae_in), output.sae_out)

    trainer.build_train_step_log_dict = build_from_factors


@torch.no_grad()
def explained_variance(sae: MatrixTrainingSAE, rows: LowRank, reconstruction: Code) -> dict[str, float]:
    """The entries of SAELens' log that are about the reconstruction, from factors."""
    errors, variance = sae.squared_errors(reconstruction, rows)[:, 0], batch_variance(rows)
    shares = 1 - errors / variance
    return {
        "metrics/explained_variance_legacy": shares.mean().item(),
        "metrics/explained_variance_legacy_std": shares.std().item(),
        "metrics/explained_variance": (1 - errors.mean() / variance.mean()).item(),
    }


@dataclass
class FactorScaler(ActivationScaler):
    """SAELens' scaler of activations, which multiplies packed rows by multiplying their values."""

    d_k: int = 0
    d_v: int = 0

    def scale(self, acts: Tensor) -> Tensor:
        if self.scaling_factor is None or acts.shape[-1] >= self.d_k * self.d_v:
            return super().scale(acts)
        return pack(unpack(acts, self.d_k, self.d_v) * self.scaling_factor)

    def _calculate_mean_norm(self, data_provider: Iterator[Tensor], n_batches_for_norm_estimate: int = 1000) -> float:
        norms = (unpack(batch, self.d_k, self.d_v).norm()[:, None] for batch in data_provider)
        return super()._calculate_mean_norm(norms, n_batches_for_norm_estimate)
