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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import wandb
from sae_lens import LanguageModelSAETrainingRunner
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME, TRAINER_STATE_FILENAME
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.mixing_buffer import mixing_buffer
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from hookpoints import Recurrence
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
from sae_lens_writesae.choices import Loss
from sae_lens_writesae.files import SAVE_SECONDS
from sae_lens_writesae.sae.factors import Collection
from sae_lens_writesae.sae.metric import Metric
from sae_lens_writesae.sae.target import HeadHook, HookTarget, RunnerConfig
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
        torch.manual_seed(random_seed(seed, step))
        yield


def random_seed(seed: int, step: int) -> int:
    """Of the random numbers of one step."""
    return (seed * 1_000_003 + step + 1) % 2**63


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


# ------------------------------------------------------------------------------------------------ rows at hand


@dataclasses.dataclass(frozen=True)
class Rows:
    """What SAELens' trainer is given instead of a store."""

    batches_from: Callable[[int], Iterator[Tensor]]
    """Batches [n,K*V + columns] without end, from that number on: a run that resumes gets those it has not had."""
    n_rows: int
    """So many rows differ."""
    inputs: object
    """What they are made of, as `content_hash` takes it."""


def rows_of_writes(cfg: RunnerConfig, writes: Writes) -> Rows:
    """Writes as matrices, and behind them the same again, where the loss compares with writes."""

    def batches_from(first: int) -> Iterator[Tensor]:
        for numbers in row_orders(len(writes), cfg.train_batch_size_tokens, cfg.seed, first):
            part = writes.rows(numbers.to(writes.keys.device))
            rows = part.to(torch.promote_types(part.keys.dtype, torch.float32)).dense().flatten(1)
            yield torch.cat([rows, COLUMN_SCALE * rows], dim=1) if cfg.sae.loss == "write" else rows

    return Rows(batches_from, len(writes), inputs_of(writes))


def rows_of_collection(cfg: RunnerConfig, collection: Collection) -> Rows:
    """Rows of a head, mixed by SAELens' buffer. States are rebuilt for a few sequences at a time, also those of the
    batches that a resumed run leaves out, which costs little compared with their steps."""
    hook = HeadHook.parse(cfg.hook_name)
    positions = slice(*cfg.seqpos_slice)
    parts = torch.arange(collection.n_sequences).split(max(1, cfg.store_batch_size_prompts))
    batch = cfg.train_batch_size_tokens
    rows_per_sequence = len(range(cfg.context_size)[positions])
    buffer_size = max(cfg.n_batches_in_buffer * rows_per_sequence, batch)

    def parts_in_order() -> Iterator[Tensor]:
        for epoch in count():
            with seeded(cfg.seed, epoch):
                order = torch.randperm(len(parts)).tolist()
            for part in order:
                recurrence = collection.recurrence(hook.layer, hook.head, parts[part])
                yield head_rows(recurrence, hook.target, cfg.sae.loss, positions).float().flatten(0, 1)

    def batches_from(first: int) -> Iterator[Tensor]:
        mixed = mixing_buffer(buffer_size, batch, parts_in_order(), cfg.activations_mixing_fraction)
        for number in count():
            with seeded(cfg.seed, number):  # of the buffer's permutations
                rows = next(mixed)
            if number >= first:
                yield rows

    return Rows(batches_from, collection.tokens.numel(), collection.sha256)


def head_rows(recurrence: Recurrence, target: HookTarget, loss: Loss, positions: slice = slice(None)) -> Tensor:
    """[B,T',K*V + columns] writes or states of head 0, flattened, and what `loss` compares them with: the query that
    reads them, or the write of the same token."""
    numbers = list(range(recurrence.T))[positions]
    of_head = recurrence.select(heads=0)
    writes = of_head.write(positions=numbers)[:, :, 0].flatten(2)
    matrices = writes
    if target == "state":
        matrices = of_head.states(positions=numbers)[:, :, 0].flatten(2)
    if loss == "reads":
        columns = read_queries(of_head)[:, positions, 0]
    elif loss == "write":
        columns = writes
    else:
        columns = writes[..., :0]
    return torch.cat([matrices, COLUMN_SCALE * columns.to(matrices)], dim=-1)


def read_queries(recurrence: Recurrence) -> Tensor:
    """[B,T,H,K] the query that reads the state after each token.

    It is the token's own query, or the next token's where the rule reads before it writes (zero for the last token).
    """
    q = recurrence.q
    if recurrence.read_before_write:
        return torch.cat([q[:, 1:], torch.zeros_like(q[:, :1])], dim=1)
    return q


# ------------------------------------------------------------------------------------------------ SAELens' trainer


def train_on_rows(
    cfg: RunnerConfig, rows: Rows, metric: Metric | None = None, checkpoint: Path | None = None
) -> MatrixTrainingSAE:
    """Train by SAELens' trainer, with random numbers that follow from the seed and the number of the batch.

    Args:
        checkpoint: a folder that is written every minute: the dictionary, and the state of SAELens' trainer.

    Raises:
        OSError, ValueError: what `Checkpoint` raises, or numbers that are not finite.
    """
    sae = new_sae(cfg, metric)
    sae.cfg.metadata.n_training_rows = rows.n_rows
    kept = Checkpoint(checkpoint, [cfg], (rows.inputs, metric and vars(metric)))
    n_taken = 0

    def state() -> dict[str, object]:
        return {"sae": sae.state_dict(), "taken": n_taken}

    def batches() -> Iterator[Tensor]:
        nonlocal n_taken
        for batch in rows.batches_from(n_taken):
            if trainer.n_training_steps:  # SAELens asks for the next batch between two steps
                kept.save(state, trainer.save_trainer_state)
            n_taken += 1
            torch.manual_seed(random_seed(cfg.seed, n_taken))  # of what the step draws
            yield metric.apply_rows(batch) if metric else batch

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
            n_taken = saved["taken"]
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
