"""Training through SAELens' own runner: configs for a head, recurrent models by class name, interruptions that lose
nothing, and SAELens' command line."""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, cast

import sae_lens.cache_activations_runner
import sae_lens.llm_sae_training_runner
import sae_lens.load_model
import sae_lens.multi_sae_training_runner
import torch
from datasets import Dataset
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig
from sae_lens.constants import RUNNER_CFG_FILENAME
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from transformer_lens import HookedRootModule

from hookpoints import HookedRecurrent, embedded
from sae_lens_writesae.sae.losses import Loss
from sae_lens_writesae.sae.store import PairedActivationsStore
from sae_lens_writesae.sae.target import RunnerConfig, Target, check_hook, head_target
from sae_lens_writesae.sae.training import MatrixTrainingSAE

MODEL_CLASS_NAME = "HookedRecurrent"
"""The `model_class_name` with which SAELens' runners load a hookpoints model."""

Trainer = SAETrainer[Any, Any]

# ------------------------------------------------------------------------------------------------ models by name

_LOADERS = (
    sae_lens.load_model,
    sae_lens.llm_sae_training_runner,
    sae_lens.cache_activations_runner,
    sae_lens.multi_sae_training_runner,
)
"""The modules that bind `load_model` by name."""
_MARK = "__writesae__"


def register_model_class() -> None:
    """Let SAELens' `load_model` know `HookedRecurrent`, in every module that binds it. Repeating it is harmless.

    SAELens loads models by a fixed chain of names, with no registry to add to.
    """
    for module in _LOADERS:
        original: Callable[..., HookedRootModule] = module.load_model  # type: ignore[attr-defined]
        if not hasattr(original, _MARK):
            module.load_model = _extended(original)  # type: ignore[attr-defined]


def _extended(original: Callable[..., HookedRootModule]) -> Callable[..., HookedRootModule]:
    @functools.wraps(original)
    def load_model(
        model_class_name: str,
        model_name: str,
        device: str | torch.device | None = None,
        model_from_pretrained_kwargs: dict[str, Any] | None = None,
        **kwargs: object,
    ) -> HookedRootModule:
        if model_class_name == MODEL_CLASS_NAME:
            return HookedRecurrent.from_pretrained(model_name, device=device, **(model_from_pretrained_kwargs or {}))
        return original(model_class_name, model_name, device, model_from_pretrained_kwargs, **kwargs)

    setattr(load_model, _MARK, True)
    return load_model


register_model_class()

# ------------------------------------------------------------------------------------------------ configs and data


def training_config(
    model: HookedRecurrent,
    layer: int,
    head: int,
    *,
    target: Target = "write",
    architecture: str = "writesae_batchtopk",
    d_sae: int = 2048,
    loss: Loss = "mse",
    loss_weight: float = 0.5,
    sae: Mapping[str, object] | None = None,
    **runner: Any,
) -> RunnerConfig:
    """A SAELens runner config for one head of `model`.

    Args:
        target: what is learned; see `sae.target.Target`.
        architecture: a registered training architecture.
        d_sae: number of atoms F.
        loss: `reads` or `write` mix in what queries read, or atoms along the write, with the share `loss_weight` (see
            `sae.losses`). These two need `train` below, because SAELens' own runner lacks what they compare with.
        sae: further fields of the SAE's config, such as `{"k": 32, "encoder": "tied"}`.
        runner: further fields of `LanguageModelSAERunnerConfig`, such as `training_tokens`.

    Raises:
        ValueError: the activation buffer is smaller than a batch; and what `head_target` and the configs raise.
    """
    place = head_target(model, layer, head, target)
    _, config_class = get_sae_training_class(architecture)
    defaults: dict[str, Any] = {
        "model_name": model.cfg.model_name,
        "model_class_name": MODEL_CLASS_NAME,
        "hook_name": place.hook_name,
        "seqpos_slice": place.seqpos_slice,
        "prepend_bos": False,
        "sequence_separator_token": None,
        "streaming": False,
        "is_dataset_tokenized": False,
        "device": str(model.cfg.device),
        "logger": LoggingConfig(log_to_wandb=False),
        "n_checkpoints": 0,
        "checkpoint_path": None,
        "output_path": None,
    }
    if target == "last_state":  # a sequence gives one row, so that the buffer is counted in sequences
        defaults["n_batches_in_buffer"] = 4 * int(runner.get("train_batch_size_tokens", 256))
        defaults["train_batch_size_tokens"] = 256
    fields: dict[str, Any] = {
        **place.sae_fields,
        "d_sae": d_sae,
        "loss": loss,
        "loss_weight": loss_weight,
        **(sae or {}),
    }
    cfg = LanguageModelSAERunnerConfig(sae=config_class(**fields), **(defaults | runner))
    rows = cfg.n_batches_in_buffer * (1 if target == "last_state" else cfg.context_size)
    if rows < cfg.train_batch_size_tokens:
        raise ValueError(
            f"the activation buffer holds {rows} rows (n_batches_in_buffer {cfg.n_batches_in_buffer} x positions "
            f"kept per sequence), fewer than one batch of train_batch_size_tokens {cfg.train_batch_size_tokens}; raise "
            "n_batches_in_buffer"
        )
    return cfg


def text_dataset(text: str, min_characters: int = 2000) -> Dataset:
    """Running text as a dataset with a `text` column: documents of whole lines with `min_characters` or more each."""
    documents: list[str] = []
    document = ""
    for line in text.splitlines(keepends=True):
        document += line
        if len(document) >= min_characters:
            documents.append(document)
            document = ""
    return Dataset.from_dict({"text": [*documents, document] if document.strip() else documents})


# ------------------------------------------------------------------------------------------------ running


class Interrupts:
    """Turns SIGINT and SIGTERM into one KeyboardInterrupt, between steps.

    A signal that comes within a step waits for its end: an optimizer goes through its parameters one by one, and what
    is saved in the middle of that has made the step with some of them only. Signals after the first do nothing, so that
    saving is not interrupted.
    """

    def __init__(self) -> None:
        self._signal: str | None = None
        self._raised = self._in_step = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals in this scope; afterwards the previous handlers are back. Does nothing outside the main
        thread, where signals do not arrive."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        try:
            before = [signal.signal(number, self._receive) for number in numbers]
        except ValueError:
            yield
            return
        try:
            yield
        finally:
            for number, handler in zip(numbers, before):
                signal.signal(number, handler)

    def watch(self, trainer: Trainer) -> None:
        """Keep the steps of SAELens' trainer whole. Its loop calls `maybe_reset_sparsity` at the start of each round,
        and `step` once a batch has been taken."""
        step, begin = trainer.step, trainer.maybe_reset_sparsity

        def whole_step(batch: Tensor) -> object:
            self._in_step = True
            return step(batch)

        def between_steps() -> dict[str, Any]:
            self._in_step = False
            self.check()
            return begin()

        trainer.step, trainer.maybe_reset_sparsity = cast(Any, whole_step), between_steps

    def check(self) -> None:
        """Raise the KeyboardInterrupt that waits, if one does."""
        if self._signal is not None and not self._raised:
            self._raised = True
            raise KeyboardInterrupt(self._signal)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._signal = self._signal or signal.Signals(number).name
        if not self._in_step:
            self.check()


class WriteSAETrainingRunner(LanguageModelSAETrainingRunner):
    """SAELens' runner with the losses of `sae.losses`, in which SIGINT and SIGTERM lose nothing.

    SAELens saves neither weights nor optimizer when it is interrupted, and fails if the folder is missing. Here an
    interrupted run leaves a whole checkpoint (weights, optimizer, schedule, position in the data) in
    `checkpoint_path/<samples>`; `resume_from_checkpoint` goes on from it.
    """

    def __init__(self, cfg: RunnerConfig, **overrides: Any):
        super().__init__(cfg, **overrides)
        self._interrupts = Interrupts()
        if isinstance(self.model, HookedRecurrent):
            check_hook(self.model, cfg)
        if getattr(cfg.sae, "loss", "mse") != "mse":
            dataset = cast(Dataset, self.activations_store.dataset)
            self.activations_store = PairedActivationsStore.paired(cast(HookedRecurrent, self.model), cfg, dataset)
            self.evaluator.activations_store = self.activations_store

    def run(self) -> MatrixTrainingSAE:
        """Train and save. A signal that came within the last step is raised when the result is saved."""
        sae = super().run()
        self._interrupts.check()
        return cast(MatrixTrainingSAE, sae)

    def run_trainer_with_interruption_handling(self, trainer: Trainer) -> MatrixTrainingSAE:
        self._interrupts.watch(trainer)
        with self._interrupts.handled():
            try:
                return trainer.fit()
            except KeyboardInterrupt:
                if self.cfg.checkpoint_path is not None:
                    folder = self.save_whole_checkpoint(trainer)
                    sae_lens.logger.warning(f"interrupted; resume with resume_from_checkpoint={str(folder)!r}")
                raise

    def save_whole_checkpoint(self, trainer: Trainer) -> Path:
        """Weights, optimizer, schedule and position, in `checkpoint_path/<samples>`, which is whole or absent."""
        base = Path(cast(str, self.cfg.checkpoint_path))
        base.mkdir(parents=True, exist_ok=True)
        name = str(trainer.n_training_samples)
        with tempfile.TemporaryDirectory(dir=base, prefix=".writing-") as aside:
            trainer.save_checkpoint(name, base_path=aside)
            if not (base / name).exists():
                os.replace(Path(aside) / name, base / name)
        return base / name


class FrugalRunner(WriteSAETrainingRunner):
    """Keeps the newest two checkpoints; for a wide SAE each is gigabytes."""

    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        super().save_checkpoint(checkpoint_path)
        if checkpoint_path is not None and checkpoint_path.parent.name == Path(str(self.cfg.checkpoint_path)).name:
            for old in whole_checkpoints(checkpoint_path.parent.parent)[:-2]:
                shutil.rmtree(old)


def whole_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints below `folder` by samples seen; one that a kill cut short lacks the file that is written last."""
    found = []
    for file in folder.rglob(RUNNER_CFG_FILENAME):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError:
            continue
        found.append(file.parent)
    return sorted(found, key=lambda path: int(path.name.rpartition("_")[2]))


def train(cfg: RunnerConfig, model: HookedRecurrent | None = None, dataset: Dataset | None = None) -> MatrixTrainingSAE:
    """Train an SAE with SAELens and return it, still of its training class.

    `model` and `dataset` override those that the config names. For an architecture of SAELens the result is of SAELens'
    class.
    """
    return WriteSAETrainingRunner(cfg, override_model=model, override_dataset=dataset).run()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence SAELens' warnings in this scope. It warns that a run with a given model and text cannot be repeated from
    its config alone, which does not concern callers that keep settings of their own."""
    logger = logging.getLogger("sae_lens")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# ------------------------------------------------------------------------------------------------ command line

_GUIDE = """\
Trains an SAE with SAELens' own command line. Every flag below is SAELens'; those of the chosen --architecture follow.

A run on a head of the model that ships with the package (K = 64, V = 32, so d_in = 2048):

  writesae train-saelens --architecture writesae_batchtopk --model_class_name HookedRecurrent --model_name embedded \\
      --dataset_path embedded --is_dataset_tokenized false --streaming false --prepend_bos false \\
      --hook_name blocks.2.mixer.heads.1.hook_write_vec --d_in 2048 --d_k 64 --d_v 32 --d_sae 512 --k 32 \\
      --training_tokens 200000 --train_batch_size_tokens 512 --n_batches_in_buffer 8 \\
      --log_to_wandb false --checkpoint_path writesae-out/checkpoints --output_path writesae-out/sae

hook_write_vec trains on writes, hook_state_vec on states; --dataset_path embedded is the package's held-out text.
An interrupted run leaves a whole checkpoint in --checkpoint_path; --resume_from_checkpoint goes on from it.
"""


def train_from_arguments(arguments: Sequence[str]) -> MatrixTrainingSAE:
    """Parse SAELens' flags and train. Without arguments, or with --help, prints a guide and the flags."""
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(_GUIDE)
    cfg = _parse_cfg_args(list(arguments))
    dataset = text_dataset(embedded.text("train")) if cfg.dataset_path == "embedded" else None
    model = None
    if cfg.model_class_name == MODEL_CLASS_NAME:
        # Loaded here, so that a wrong hook or size is reported before SAELens fills a buffer.
        kwargs = cfg.model_from_pretrained_kwargs
        model = HookedRecurrent.from_pretrained(cfg.model_name, device=cfg.llm_device, **(kwargs or {}))
    return train(cfg, model, dataset)
