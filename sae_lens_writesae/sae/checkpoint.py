"""Checkpoints of a training run: what is in one beside SAELens' files, and whether a run can go on from it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from sae_lens.constants import (
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    TRAINER_STATE_FILENAME,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from hookpoints.files import CHECKSUMS, SealedFolder, read_json
from sae_lens_writesae.sae.load import CheckpointError, load_sae
from sae_lens_writesae.sae.target import RunnerConfig

RUN_STATE_FILENAME = "run_state.safetensors"
"""Steps made, atoms put on rows, and the state of torch's random numbers."""

ASIDE_PREFIX = ".writing-"
"""Of folders in which a checkpoint is written before it is renamed; a kill may leave one."""

_SAME = (
    *("seed", "model_name", "hook_name", "dataset_path", "context_size", "n_batches_in_buffer", "seqpos_slice"),
    *("store_batch_size_prompts", "train_batch_size_tokens", "activations_mixing_fraction", "exclude_special_tokens"),
    *("use_cached_activations", "prepend_bos", "dtype"),
)
"""Fields of the runner's config on which the order of the data depends."""

_MAY_DIFFER = ("metadata", "device", "sae_lens_version", "sae_lens_training_version")
"""Fields of the SAE's config that a run may change when it goes on."""


class RandomNumbers:
    """The random numbers of one run, which begin with its seed, apart from those of the program around it."""

    def __init__(self, seed: int):
        self.seed = seed
        self._state: dict[str, Tensor] | None = None

    @contextmanager
    def scope(self) -> Iterator[None]:
        """In this scope torch's global random numbers are this run's and go on from the last scope; afterwards the
        caller's are back, on every GPU too."""
        with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
            if self._state is None:
                torch.manual_seed(self.seed)
            else:
                set_random_state(self._state)
            try:
                yield
            finally:
                self._state = random_state()


def random_state() -> dict[str, Tensor]:
    """State of torch's generators on the CPU and on every GPU."""
    gpus = {f"cuda:{n}": torch.cuda.get_rng_state(n) for n in range(torch.cuda.device_count())}
    return {"cpu": torch.get_rng_state(), **gpus}


def set_random_state(state: dict[str, Tensor]) -> None:
    """Set what `random_state` gave; GPUs that this machine lacks are passed over."""
    torch.set_rng_state(state["cpu"])
    for n in range(torch.cuda.device_count()):
        if f"cuda:{n}" in state:
            torch.cuda.set_rng_state(state[f"cuda:{n}"], n)


def save_run_state(folder: Path, steps: int, n_started: int | None = None) -> None:
    """Write the steps made, the atoms put on rows (`MatrixTrainingSAE.n_started`) and the present state of torch's
    random numbers into a checkpoint."""
    started = {} if n_started is None else {"started": torch.tensor(n_started)}
    save_file({"steps": torch.tensor(steps), **started, **random_state()}, folder / RUN_STATE_FILENAME)


def load_run_state(folder: Path) -> tuple[int, int | None]:
    """Set torch's random numbers to those of a checkpoint, and return the steps made and the atoms put on rows."""
    state = load_file(folder / RUN_STATE_FILENAME)
    set_random_state(state)
    return int(state["steps"]), int(state["started"]) if "started" in state else None


def check_checkpoint(folder: Path, cfg: RunnerConfig) -> None:
    """Raise unless a run with this config can go on from `folder` as if it had never stopped.

    Raises:
        CheckpointError: a file is missing, cut, changed or a link; or the checkpoint is of a run with other settings,
            and both are named.
    """
    load_sae(folder, training=True)
    if not (folder / RUN_STATE_FILENAME).is_file():
        raise CheckpointError(
            f"{folder / RUN_STATE_FILENAME} does not exist: not a checkpoint of WriteSAETrainingRunner, so that a run "
            "cannot go on from it as if it had not stopped. SAELens' own runner may resume it"
        )
    sealed = SealedFolder(folder, CheckpointError)
    sealed.require()
    for name in sorted({*os.listdir(folder)} - {CHECKSUMS, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME}):
        sealed.file(name)  # `load_sae` checked the others
    _check_same(folder / RUNNER_CFG_FILENAME, cfg)
    try:
        torch.load(folder / TRAINER_STATE_FILENAME, map_location="cpu", weights_only=True)
    except Exception as error:  # a stranger's pickle raises whatever its instructions lead to
        raise CheckpointError(f"{folder / TRAINER_STATE_FILENAME} cannot be read ({error})") from error


def _check_same(file: Path, cfg: RunnerConfig) -> None:
    there, now = read_json(file), cast("dict[str, object]", json.loads(json.dumps(cfg.to_dict())))
    pairs = [(name, there.get(name), now.get(name)) for name in _SAME]
    before, after = there.get("sae"), now["sae"]
    if isinstance(before, dict) and isinstance(after, dict):
        pairs += [(f"sae.{name}", before.get(name), after[name]) for name in after if name not in _MAY_DIFFER]
    if differing := [f"{name} {old!r}, now {new!r}" for name, old, new in pairs if old != new]:
        raise CheckpointError(
            f"{file} is of a run with other settings ({'; '.join(differing)}); resume with the same, or begin anew"
        )
