"""SAELens' trainer on rows that are at hand, and what all ways to train share: the untrained dictionary, the order of
rows, and the checkpoint.

Rows are matrices [N,K*V], and behind them the columns that a loss compares with. Random numbers follow from the seed of
a config, and the caller's stay as they are. `sae.fast` trains on factors.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import wandb
from sae_lens import LanguageModelSAETrainingRunner
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME, TRAINER_STATE_FILENAME
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from hookpoints.errors import ChecksumError
from hookpoints.files import (
    CHECKSUMS,
    SealedFolder,
    atomic_folder,
    check_folder,
    content_hash,
    read_json,
    set_aside,
    versions,
    write_checksums,
)
from hookpoints.scopes import threads_for
from sae_lens_writesae.atom.mapped import CollectedWrites, Writes
from sae_lens_writesae.files import SAVE_SECONDS
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
        raise ValueError(
            f"metric: expected {'one (see `fit_metrics`)' if wants_metric else 'none'}, since the config has "
            f"metric={cfg.sae.metric!r}, got {'none' if wants_metric else 'one'}"
        )
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


def row_orders(
    n_rows: int, batch: int, seed: int, step: int = 0, device: torch.device | str = "cpu"
) -> Iterator[Tensor]:
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


class Checkpoint:
    """What there is of an unfinished run: a sealed folder, whole or absent, that names the settings and the inputs of
    the run. With no folder nothing is saved.

    Args:
        inputs: what the dictionaries are trained on, as `content_hash` takes it. Costs a pass over it.

    Raises:
        OSError: the folder is of something else.
    """

    def __init__(self, folder: Path | None, configs: Sequence[RunnerConfig], inputs: object) -> None:
        self.folder = folder
        self.saved = time.monotonic()
        self.made_with: dict[str, str] = {}
        if folder is not None:
            check_folder(folder, _checkpoint_files)
            settings = [(step_settings(cfg), cfg.seed, cfg.hook_name) for cfg in configs]
            self.made_with = {"settings": repr(settings), "inputs": content_hash(inputs)}

    def unfinished(self) -> Path | None:
        """The folder that a killed run left; None where there is none. One that is damaged is renamed, with a
        DamageWarning. Costs a reading.

        Raises:
            ValueError: it is of other settings, another version of this package or other inputs.
        """
        if self.folder is None or not self.folder.is_dir():
            return None
        try:
            sealed = SealedFolder(self.folder)
            sealed.require()
            sealed.check((_MADE_WITH, _STATE))
        except ChecksumError as error:
            set_aside(self.folder, str(error))
            return None
        made_with = read_json(self.folder / _MADE_WITH)
        if differing := [name for name, value in self.made_with.items() if made_with.get(name) != value]:
            raise ValueError(
                f"{self.folder}: expected a checkpoint of these settings, inputs and version of the package, got one "
                f"of other {', '.join(differing)}; delete it, or name another folder"
            )
        return self.folder

    def save(self, state: Callable[[], object], write: Callable[[Path], object] = lambda folder: None) -> None:
        """Once a minute, write the state, and what `write` puts into the folder besides."""
        if self.folder is None or time.monotonic() - self.saved <= SAVE_SECONDS:
            return

        def write_sealed(aside: Path) -> None:
            write(aside)
            torch.save(state(), aside / _STATE)
            (aside / _MADE_WITH).write_text(json.dumps(self.made_with))
            write_checksums(aside, sorted(file.name for file in aside.iterdir()))

        atomic_folder(self.folder, write_sealed, _checkpoint_files)
        self.saved = time.monotonic()

    def remove(self) -> None:
        """Of a run that is finished."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


_MADE_WITH = "made_with.json"
_STATE = "state.pt"
_FILES = (_MADE_WITH, _STATE, ACTIVATION_SCALER_CFG_FILENAME, TRAINER_STATE_FILENAME)


def _checkpoint_files(folder: Path) -> Iterable[str]:
    """Names of the files in a checkpoint; none where a folder is something else."""
    return (CHECKSUMS, *_FILES) if (folder / _MADE_WITH).is_file() else ()


def saved_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint has of `Checkpoint.save`."""
    return torch.load(folder / _STATE, weights_only=True)


def inputs_of(writes: Writes) -> object:
    """What a checkpoint compares of writes: their name, or the factors themselves."""
    return writes.name if isinstance(writes, CollectedWrites) else (writes.keys, writes.values)


class Batches(ABC, Iterator[Tensor]):
    """Batches of rows [N,K*V + columns] without end. After `resume`, batches are those that follow the
    `state`."""

    n_rows: int
    """So many rows differ."""
    inputs: object
    """What they are made of, as `content_hash` takes it."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs of it."""

    @abstractmethod
    def resume(self, state: dict[str, Tensor]) -> None:
        """Continue where `state` was taken."""


class ShuffledWrites(Batches):
    """Writes as rows [N,K*V], and behind them the same again, where the loss compares with writes. Every epoch has its
    own order."""

    def __init__(self, cfg: RunnerConfig, writes: Writes) -> None:
        self.cfg = cfg
        self.writes = writes
        self.n_rows = len(writes)
        self.inputs = inputs_of(writes)
        self.resume({"taken": torch.tensor(0)})

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
        self.taken = int(state["taken"])
        self.order = row_orders(len(self.writes), self.cfg.train_batch_size_tokens, self.cfg.seed, self.taken)


@dataclasses.dataclass
class MixedRows(Batches):
    """Rows of parts of a text, mixed as SAELens' `mixing_buffer` mixes them (the same batches from the same random
    numbers), with a state that a checkpoint can keep. Every epoch takes the parts in a new order."""

    rows_of: Callable[[int], Tensor]
    """The rows [n,K*V + columns] of a part, by its number."""
    n_parts: int
    """So many parts make the text."""
    size: int
    """Rows of the buffer, `batch` at least."""
    batch: int
    fraction: float
    """Of the buffer, which stays for the next mix."""
    n_rows: int = 0
    inputs: object = ""

    def __post_init__(self) -> None:
        self.order = torch.zeros(0, dtype=torch.long)
        self.mixed = self.waiting = torch.zeros(0, 0)
        """Rows of the next batches, and rows that wait for the next mix."""

    def __next__(self) -> Tensor:
        if not len(self.mixed):
            self._fill_buffer()
        batch = self.mixed[: self.batch]
        self.mixed = self.mixed[self.batch :]
        return batch

    def _fill_buffer(self) -> None:
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
        vars(self).update(state)


def train_on_rows(
    cfg: RunnerConfig, rows: Batches, metric: Metric | None = None, checkpoint: Path | None = None
) -> MatrixTrainingSAE:
    """Train by SAELens' trainer on batches of rows [N,K*V + columns], with the random numbers of the seed.

    Args:
        checkpoint: a folder that is written every minute: the states of SAELens' trainer, of random numbers and of
            `rows` (for `MixedRows` as large as the buffer).

    Raises:
        OSError, ValueError: what `Checkpoint` raises, or numbers that are not finite.
    """
    sae = new_sae(cfg, metric)
    sae.cfg.metadata.n_training_rows = rows.n_rows
    kept = Checkpoint(checkpoint, [cfg], (rows.inputs, metric and vars(metric)))

    def state() -> dict[str, object]:
        random = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
        return {"sae": sae.state_dict(), "random": random, "rows": rows.state()}

    def batches() -> Iterator[Tensor]:
        for batch in rows:
            yield metric.apply_rows(batch) if metric else batch
            if trainer.n_training_steps:  # SAELens asks for the next batch between two steps
                kept.save(state, trainer.save_trainer_state)

    trainer = SAETrainer(cfg.to_sae_trainer_config(), sae, batches())
    with (
        seeded(cfg.seed, 0),
        wandb_run(cfg),
        threads_for(cfg.train_batch_size_tokens * cfg.sae.d_sae * cfg.sae.d_in),
    ):
        if folder := kept.unfinished():
            saved = saved_state(folder)
            sae.load_state_dict(saved["sae"])
            trainer.load_trainer_state(folder)
            rows.resume(saved["rows"])
            torch.set_rng_state(saved["random"][0])
            torch.cuda.set_rng_state_all(saved["random"][1:])
        trainer.fit()
    if not torch.nn.utils.get_total_norm(sae.parameters()).isfinite():
        raise ValueError("weights: expected finite numbers after training, got NaN or infinity: of the rows, or of lr")
    kept.remove()
    return metric.fold(sae) if metric else sae


def wandb_run(cfg: RunnerConfig, **options: Any) -> AbstractContextManager[Any]:
    """The run at Weights & Biases that SAELens' runner opens for a config that asks for one."""
    log = cfg.logger
    if not log.log_to_wandb:
        return nullcontext()
    names = {"project": log.wandb_project, "entity": log.wandb_entity, "name": log.run_name, "id": log.wandb_id}
    return wandb.init(config=cfg.to_dict(), **names, **options)
