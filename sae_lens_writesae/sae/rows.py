"""SAELens' trainer on rows that are at hand: matrices [N,K*V], and behind them the columns that a loss compares with.

Random numbers follow from the seed of a config, and the caller's stay as they are. `sae.fast` trains on factors.
"""

from __future__ import annotations

import dataclasses
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import wandb
from sae_lens import LanguageModelSAETrainingRunner
from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME,
    ACTIVATION_WHITENING_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
    TRAINER_STATE_FILENAME,
)
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from hookpoints.errors import ChecksumError
from hookpoints.files import (
    CHECKSUMS,
    SealedFolder,
    aside_of,
    atomic_folder,
    check_folder,
    set_aside,
    versions,
    write_checksums,
)
from hookpoints.scopes import threads_for
from sae_lens_writesae.atom.low_rank import LowRank
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
    wants_metric = cfg.sae.metric != "frobenius"
    if wants_metric != (metric is not None):
        raise ValueError(f"metric={cfg.sae.metric!r}: must be frobenius, or given (see `fit_metrics`).")
    with seeded(cfg.seed, -1):
        sae = cast(MatrixTrainingSAE, TrainingSAE.from_dict(cfg.get_training_sae_cfg_dict() | {"device": cfg.device}))
    # SAELens keeps this with its runner, which would load the language model.
    LanguageModelSAETrainingRunner._set_sae_metadata(cast(Any, SimpleNamespace(cfg=cfg, sae=sae)))
    sae.in_metric = metric is not None
    return sae


def step_settings(cfg: RunnerConfig, **sae: object) -> str:
    """What a step of training depends on, but for rows and seed. `sae`: other fields of the SAE config."""
    of_sae = dataclasses.replace(cfg.sae, metadata=type(cfg.sae.metadata)(), **sae)
    trainer = dataclasses.replace(cfg.to_sae_trainer_config(), checkpoint_path=None)
    return repr((of_sae, trainer, cfg.device, versions().get("sae-lens-writesae")))


@contextmanager
def seeded(seed: int, step: int) -> Iterator[None]:
    """A scope with its own random numbers, which follow from a seed and a step: a resumed run draws those of one
    that never stopped."""
    with torch.random.fork_rng():
        torch.manual_seed((seed * 1_000_003 + step + 1) % 2**63)
        yield


def shuffled(n_rows: int, batch: int, seed: int, step: int = 0, device: torch.device | str = "cpu") -> Iterator[Tensor]:
    """[batch] row numbers of a step and all later ones. Every epoch is a new permutation of N rows, and a batch may
    reach from one epoch into the next, so that all rows are seen equally often. They are the same on every device."""
    epoch, skipped = divmod(step * batch, n_rows)
    order = torch.zeros(0, dtype=torch.long, device=device)
    while True:
        while len(order) < batch + skipped:
            with seeded(seed, epoch):  # an epoch's order needs none before it: a resumed run draws one
                order = torch.cat([order, torch.randperm(n_rows).to(device)])
            epoch += 1
        yield order[skipped : skipped + batch]
        order = order[skipped + batch :]
        skipped = 0


class Batches(ABC, Iterator[Tensor]):
    """Batches of rows [N,K*V + columns] without end. After `resume`, batches are those that follow the
    `state`."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs of it."""

    @abstractmethod
    def resume(self, state: dict[str, Tensor]) -> None:
        """Continue where `state` was taken."""


class ShuffledWrites(Batches):
    """Writes as rows [N,K*V], and behind them the same again, where the loss compares with writes. Every epoch has its
    own order."""

    def __init__(self, cfg: RunnerConfig, writes: LowRank) -> None:
        self.cfg = cfg
        self.writes = writes
        self._begin(0)

    def _begin(self, taken: int) -> None:
        self.taken = taken
        self.order = shuffled(len(self.writes), self.cfg.train_batch_size_tokens, self.cfg.seed, taken)

    def __next__(self) -> Tensor:
        part = self.writes.rows(next(self.order).to(self.writes.keys.device))
        self.taken += 1
        rows = part.to(torch.promote_types(part.keys.dtype, torch.float32)).dense().flatten(1)
        if self.cfg.sae.loss == "write":
            return torch.cat([rows, COLUMN_SCALE * rows], dim=1)
        return rows

    def state(self) -> dict[str, Tensor]:
        return {"taken": torch.tensor(self.taken)}

    def resume(self, state: dict[str, Tensor]) -> None:
        self._begin(int(state["taken"]))


class MixedRows(Batches):
    """Rows of parts of a text, mixed as SAELens' `mixing_buffer` mixes them (the same batches from the same random
    numbers), with a state that a checkpoint can keep. Every epoch takes the parts in a new order.

    Args:
        rows_of: the rows [n,K*V + columns] of a part, by its number.
        n_parts: so many parts make the text.
        size: rows of the buffer, `batch` at least. `fraction` of it stays for the next mix.
    """

    def __init__(self, rows_of: Callable[[int], Tensor], n_parts: int, size: int, batch: int, fraction: float) -> None:
        self.rows_of = rows_of
        self.n_parts = n_parts
        self.size = size
        self.batch = batch
        self.fraction = fraction
        self.order = torch.zeros(0, dtype=torch.long)
        self.mixed = self.waiting = torch.zeros(0, 0)
        """Rows of the next batches, and rows that wait for the next mix."""

    def __next__(self) -> Tensor:
        if not len(self.mixed):
            self._mix()
        batch = self.mixed[: self.batch]
        self.mixed = self.mixed[self.batch :]
        return batch

    def _mix(self) -> None:
        rows = [self.waiting] if len(self.waiting) else []
        while True:  # one part at least
            if not len(self.order):
                self.order = torch.randperm(self.n_parts)
            rows.append(self.rows_of(int(self.order[0])))
            self.order = self.order[1:]
            if sum(map(len, rows)) >= self.size:
                break
        buffer = torch.cat(rows)
        if self.fraction > 0:
            buffer = buffer[torch.randperm(len(buffer))]
        n_batches = max(1, (len(buffer) - int(self.size * self.fraction)) // self.batch)
        self.mixed = buffer[: n_batches * self.batch]
        self.waiting = buffer[n_batches * self.batch :]

    def state(self) -> dict[str, Tensor]:
        # Copies: torch saves the whole storage of a slice.
        return {name: getattr(self, name).clone() for name in ("order", "mixed", "waiting")}

    def resume(self, state: dict[str, Tensor]) -> None:
        self.order = state["order"]
        self.mixed = state["mixed"]
        self.waiting = state["waiting"]


def train_on_rows(
    cfg: RunnerConfig,
    rows: Iterator[Tensor],
    metric: Metric | None = None,
    checkpoint: Path | None = None,
    n_rows: int | None = None,
    inputs: str = "",
) -> MatrixTrainingSAE:
    """Train by SAELens' trainer on batches of rows [N,K*V + columns], with the random numbers of the seed.

    Args:
        rows: `Batches`, where there is a checkpoint.
        checkpoint: a folder that is written at each twentieth of the run: SAELens' own checkpoint, the random numbers,
            and the state of `rows` (for `MixedRows` as large as the buffer). The same call resumes from it, to the
            weights of a run that never stopped.
        n_rows: how many different rows there are, for the metadata.
        inputs: names what `rows` are made of.

    Raises:
        OSError: `checkpoint` is a folder of something else.
        ValueError: it is a checkpoint of other `inputs`, settings or another version of this package. One that is
            damaged is renamed, with a DamageWarning, and training begins again.
    """
    settings = cfg.to_sae_trainer_config()
    made_with = {"inputs": inputs, "settings": repr((step_settings(cfg), cfg.seed, cfg.hook_name))}
    sae = new_sae(cfg, metric)
    sae.cfg.metadata.n_training_rows = n_rows

    def keep(checkpoint_path: Path | None) -> None:  # whole or absent
        folder = cast(Path, checkpoint_path)
        random = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
        torch.save({"random": random, "rows": cast(Batches, rows).state(), **made_with}, folder / _SOURCE)
        write_checksums(folder, sorted(file.name for file in folder.iterdir() if file.name != CHECKSUMS))

        def move(aside: Path) -> None:
            for file in folder.iterdir():
                file.rename(aside / file.name)

        atomic_folder(cast(Path, checkpoint), move, _checkpoint_files)
        folder.rmdir()

    if checkpoint is not None:
        check_folder(checkpoint, _checkpoint_files)
    in_metric = map(metric.apply_rows, rows) if metric else rows
    with (
        nullcontext() if checkpoint is None else aside_of(checkpoint) as part,
        seeded(cfg.seed, 0),
        wandb_run(cfg),
        threads_for(cfg.train_batch_size_tokens * cfg.sae.d_sae * cfg.sae.d_in),
    ):
        if part is not None:
            settings = dataclasses.replace(settings, n_checkpoints=19, checkpoint_path=str(part))
        trainer = SAETrainer(settings, sae, in_metric, save_checkpoint_fn=keep if part else None)
        if checkpoint is not None and _is_whole(checkpoint):
            _resume(trainer, checkpoint, cast(Batches, rows), made_with)
        trainer.fit()
    if not torch.nn.utils.get_total_norm(sae.parameters()).isfinite():
        raise ValueError("weights: expected finite numbers after training, got NaN or infinity: of the rows, or of lr")
    if checkpoint is not None:
        shutil.rmtree(checkpoint, ignore_errors=True)
    return metric.fold(sae) if metric else sae


_SOURCE = "source.pt"
"""Of a checkpoint: the random numbers, where the rows are, what they are made of, and the settings."""
_OF_SAELENS = (
    ACTIVATION_SCALER_CFG_FILENAME,
    ACTIVATION_WHITENING_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
    TRAINER_STATE_FILENAME,
)
"""What SAELens may write to a checkpoint."""


def _checkpoint_files(folder: Path) -> Iterable[str]:
    """Names of the files in a checkpoint that `train_on_rows` wrote; none where it wrote none."""
    return (CHECKSUMS, _SOURCE, *_OF_SAELENS) if (folder / _SOURCE).is_file() else ()


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is there as it was written. One that is damaged is set aside. Costs a reading."""
    if not checkpoint.is_dir():
        return False
    try:
        sealed = SealedFolder(checkpoint)
        sealed.require()
        sealed.check((_SOURCE, TRAINER_STATE_FILENAME, SAE_WEIGHTS_FILENAME))
    except ChecksumError as error:
        set_aside(checkpoint, str(error))
        return False
    return True


def _resume(trainer: SAETrainer[Any, Any], checkpoint: Path, rows: Batches, made_with: Mapping[str, str]) -> None:
    """Put trainer, rows and torch's random numbers where they were as `checkpoint` was written."""
    source = torch.load(checkpoint / _SOURCE, weights_only=True)
    if differing := [name for name in made_with if source.get(name) != made_with[name]]:
        raise ValueError(
            f"{checkpoint}: expected a checkpoint of these rows, settings and version of the package, got one of other "
            f"{', '.join(differing)}; delete it"
        )
    trainer.sae.load_weights_from_checkpoint(checkpoint)
    trainer.load_trainer_state(checkpoint)
    trainer.n_training_steps += 1  # SAELens saves before it counts the step
    ahead = [at for at in trainer.checkpoint_thresholds if at >= trainer.n_training_samples]
    trainer.checkpoint_thresholds = ahead
    rows.resume(source["rows"])
    torch.set_rng_state(source["random"][0])
    torch.cuda.set_rng_state_all(source["random"][1:])


def wandb_run(cfg: RunnerConfig, **options: Any) -> AbstractContextManager[Any]:
    """The run at Weights & Biases that SAELens' runner opens for a config that asks for one."""
    log = cfg.logger
    if not log.log_to_wandb:
        return nullcontext()
    names = {"project": log.wandb_project, "entity": log.wandb_entity, "name": log.run_name, "id": log.wandb_id}
    return wandb.init(config=cfg.to_dict(), **names, **options)
