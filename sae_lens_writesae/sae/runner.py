"""Training through SAELens' own runner, with interruptions that lose nothing, and recurrent models by class name."""

from __future__ import annotations

import functools
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import sae_lens.cache_activations_runner
import sae_lens.llm_sae_training_runner
import sae_lens.load_model
import sae_lens.multi_sae_training_runner
import torch
from datasets import Dataset
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer

from hookpoints import HookedRecurrent
from sae_lens_writesae.sae.interrupts import Interrupts
from sae_lens_writesae.sae.losses import Loss
from sae_lens_writesae.sae.store import AlignedStore
from sae_lens_writesae.sae.target import Target, check_hook, head_target

MODEL_CLASS_NAME = "HookedRecurrent"
"""``model_class_name`` that makes SAELens' runners load a hookpoints model."""

_USERS = (
    sae_lens.load_model,
    sae_lens.llm_sae_training_runner,
    sae_lens.cache_activations_runner,
    sae_lens.multi_sae_training_runner,
)
"""The modules that bind ``load_model`` by name."""
_MARK = "__writesae__"


def register_model_class() -> None:
    """Let SAELens' ``load_model`` know ``HookedRecurrent`` in every module that binds it. Repeating it is harmless.

    SAELens loads models by a fixed chain of names, with no registry to add to.
    """
    for module in _USERS:
        original: Callable[..., Any] = module.load_model  # type: ignore[attr-defined]
        if not hasattr(original, _MARK):
            module.load_model = _extended(original)  # type: ignore[attr-defined]


def _extended(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_model(
        model_class_name: str,
        model_name: str,
        device: str | torch.device | None = None,
        model_from_pretrained_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        if model_class_name == MODEL_CLASS_NAME:
            return HookedRecurrent.from_pretrained(model_name, device=device, **(model_from_pretrained_kwargs or {}))
        return original(model_class_name, model_name, device, model_from_pretrained_kwargs, **kwargs)

    setattr(load_model, _MARK, True)
    return load_model


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
    sae: dict[str, Any] | None = None,
    **runner: Any,
) -> LanguageModelSAERunnerConfig[Any]:
    """A SAELens runner config for one head of ``model``.

    Args:
        target: what is learned; see ``targets.Target``.
        architecture: a registered training architecture.
        d_sae: atoms.
        loss: ``reads`` or ``write`` mix in what queries read, or atoms along the write (``training_loss``), with the
            share ``loss_weight``; these need ``train`` below, SAELens' own runner lacks what they compare with.
        sae: further fields of the SAE's config, such as ``{"k": 32, "encoder": "tied"}``.
        runner: further fields of ``LanguageModelSAERunnerConfig``, such as ``training_tokens``.
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
    if target == "last_state":  # one row per sequence, so that the buffer is counted in sequences
        defaults["n_batches_in_buffer"] = 4 * int(runner.get("train_batch_size_tokens", 256))
        defaults["train_batch_size_tokens"] = 256
    asked = {"d_sae": d_sae, "loss": loss, "loss_weight": loss_weight}
    fields: dict[str, Any] = {**place.sae_fields, **asked, **(sae or {})}
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
    """Running text as a dataset with a ``text`` column, one document per ``min_characters`` or more of whole lines."""
    documents: list[str] = []
    part = ""
    for line in text.splitlines(keepends=True):
        part += line
        if len(part) >= min_characters:
            documents.append(part)
            part = ""
    return Dataset.from_dict({"text": [*documents, part] if part.strip() else documents})


class WriteSAETrainingRunner(LanguageModelSAETrainingRunner):
    """SAELens' runner, except that SIGINT and SIGTERM lose nothing, and that it knows the losses of ``training_loss``.

    SAELens saves neither weights nor optimizer when interrupted, and fails if the folder is missing. Here an
    interrupted run leaves a whole checkpoint (weights, optimizer, schedule, position in the data) in
    ``checkpoint_path/<samples>``, written aside and renamed; ``resume_from_checkpoint`` goes on from it.
    """

    def __init__(self, cfg: LanguageModelSAERunnerConfig[Any], **overrides: Any):
        super().__init__(cfg, **overrides)
        self._interrupts = Interrupts()
        if isinstance(self.model, HookedRecurrent):
            check_hook(self.model, cfg)
        if getattr(cfg.sae, "loss", "mse") != "mse":
            self.activations_store = AlignedStore.aligned(self.model, cfg, self.activations_store.dataset)
            self.evaluator.activations_store = self.activations_store

    def run(self) -> Any:
        """Train and save. A signal that came within the last step is raised when the result is saved."""
        sae = super().run()
        self._interrupts.check()
        return sae

    def run_trainer_with_interruption_handling(self, trainer: SAETrainer[Any, Any]) -> Any:
        self._interrupts.watch(trainer)
        with self._interrupts.heard():
            try:
                return trainer.fit()
            except KeyboardInterrupt:
                if self.cfg.checkpoint_path is not None:
                    saved = self.save_whole_checkpoint(trainer)
                    sae_lens.logger.warning(f"interrupted; resume with resume_from_checkpoint={str(saved)!r}")
                raise

    def save_whole_checkpoint(self, trainer: SAETrainer[Any, Any]) -> Path:
        """Weights, optimizer, schedule and position, in ``checkpoint_path/<samples>``."""
        base = Path(cast(str, self.cfg.checkpoint_path))
        base.mkdir(parents=True, exist_ok=True)
        name = str(trainer.n_training_samples)
        with tempfile.TemporaryDirectory(dir=base, prefix=".writing-") as aside:
            trainer.save_checkpoint(name, base_path=aside)
            target = base / name
            if not target.exists():
                os.replace(Path(aside) / name, target)
        return base / name


def train(
    cfg: LanguageModelSAERunnerConfig[Any], model: HookedRecurrent | None = None, dataset: Dataset | None = None
) -> Any:
    """Train an SAE with SAELens; returns the trained (training) SAE. ``model`` and ``dataset`` override those named."""
    return WriteSAETrainingRunner(cfg, override_model=model, override_dataset=dataset).run()


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing below an error is heard from SAELens inside: it warns that a run with a given model and text cannot be
    repeated from its config alone, for those that keep settings of their own."""
    logger = logging.getLogger("sae_lens")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
