"""Training through SAELens' own runner: configs for a head, recurrent models by class name, interruptions that lose
nothing, and SAELens' command line."""

from __future__ import annotations

import functools
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
import wandb
from datasets import Dataset
from sae_lens import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
)
from sae_lens.constants import RUNNER_CFG_FILENAME
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from transformer_lens import HookedRootModule

from hookpoints import HookedRecurrent, embedded
from hookpoints.files import CHECKSUMS, write_checksums
from sae_lens_writesae.choices import MetricName
from sae_lens_writesae.files import named_errors
from sae_lens_writesae.sae.buffer import MixingBuffer
from sae_lens_writesae.sae.checkpoint import (
    ASIDE_PREFIX,
    RandomNumbers,
    check_checkpoint,
    load_run_state,
    save_run_state,
)
from sae_lens_writesae.sae.collection import INDEX, Collection, CollectionError
from sae_lens_writesae.sae.half_life import half_lives
from sae_lens_writesae.sae.load import load_sae
from sae_lens_writesae.sae.losses import Loss
from sae_lens_writesae.sae.metric import METRIC_FILENAME, Metric, put_in_metric
from sae_lens_writesae.sae.metric_fit import fit_metrics
from sae_lens_writesae.sae.store import CollectedRows, PairedActivationsStore, SeededStore
from sae_lens_writesae.sae.target import HeadHook, RunnerConfig, Target, check_hook, head_target
from sae_lens_writesae.sae.training import MatrixTrainingSAE, MatrixTrainingSAEConfig
from sae_lens_writesae.sae.writes import Trainer, check_metric, on_factors, step_threads

MODEL_CLASS_NAME = "HookedRecurrent"
"""The `model_class_name` with which SAELens' runners load a hookpoints model."""

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
    """Let SAELens' `load_model` know `HookedRecurrent`, in every module that binds it, and let its runners check that
    SAEs fit their hooks. Repeating it is harmless.

    SAELens loads models by a fixed chain of names, with no registry to add to. Its runners compare d_in alone, so that
    swapped d_k and d_v would train on transposed matrices.
    """
    for module in _LOADERS:
        original: Callable[..., HookedRootModule] = module.load_model  # type: ignore[attr-defined]
        if not hasattr(original, _MARK):
            module.load_model = _extended(original)  # type: ignore[attr-defined]
    for runner in (LanguageModelSAETrainingRunner, MultiSAETrainingRunner):
        if not hasattr(runner.__init__, _MARK):
            runner.__init__ = _checked(runner.__init__)  # type: ignore[method-assign]


def _checked(init: Callable[..., None]) -> Callable[..., None]:
    """The constructor of a runner, which then raises what `check_hook` raises. No text has been read by then."""

    @functools.wraps(init)
    def __init__(
        runner: Any, cfg: RunnerConfig | MultiSAETrainingRunnerConfig, *args: object, **kwargs: object
    ) -> None:
        init(runner, cfg, *args, **kwargs)
        several = isinstance(cfg, MultiSAETrainingRunnerConfig)
        pairs = (
            [(cfg.hook_names_per_sae[n], sae) for n, sae in cfg.saes.items()] if several else [(cfg.hook_name, cfg.sae)]
        )
        for name, sae in pairs if isinstance(runner.model, HookedRecurrent) else ():
            check_hook(runner.model, name, sae)

    setattr(__init__, _MARK, True)
    return __init__


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

RUNNER: dict[str, float | int | str] = {
    "lr": 3e-3,
    "lr_scheduler_name": "cosineannealing",
    "lr_warm_up_steps": 20,
    "train_batch_size_tokens": 128,
    "dead_feature_window": 200,
}
"""Settings of SAELens' runner for dictionaries of writes. docs/dictionaries.md compares them on twelve heads of
three models, with three seeds each: a rate of 1e-3 is worse on 1 head, 500 steps on 3, a random start on 5, no centring
on none, and better is none of these on any; 64 atoms instead of 256 are worse on 10, 1,024 better on 8."""


def training_config(
    model: HookedRecurrent | Collection,
    layer: int,
    head: int,
    *,
    target: Target = "write",
    architecture: str = "writesae_topk",
    d_sae: int = 2048,
    loss: Loss = "mse",
    loss_weight: float = 0.5,
    metric: MetricName = "frobenius",
    sae: Mapping[str, object] | None = None,
    **runner: Any,
) -> RunnerConfig:
    """A SAELens runner config for one head of `model`.

    What is not given is `RUNNER`, a start from native writes, and for TopK one active atom; docs/dictionaries.md says
    what such dictionaries are worth. `PAPER_RUNNER` has the paper's settings.

    Args:
        model: the language model, or a collection of its factors, with which no language model is loaded.
        target: what is learned; see `sae.target.Target`.
        architecture: a registered training architecture.
        d_sae: number of atoms F.
        metric: `gauss_newton` trains in the metric of the model's own KL divergence instead of squared errors (writes
            only; see `sae.metric`). It needs `train` below.
        loss: `reads` or `write` mix in what queries read, or atoms along the write, with the share `loss_weight` (see
            `sae.losses`). These two need `train` below, because SAELens' own runner lacks what they compare with.
        sae: further fields of the SAE's config, such as `{"k": 32, "encoder": "tied", "inputs": "factors"}`; the last
            trains on the factors of writes, which is faster and makes the buffer smaller.
        runner: further fields of `LanguageModelSAERunnerConfig`, such as `training_tokens`.

    Raises:
        ValueError: the activation buffer is smaller than a batch, or the run too short for its learning-rate schedule;
            and what `head_target` and the configs raise.
    """
    collected = isinstance(model, Collection)
    place = model.head_target(layer, head, target) if collected else head_target(model, layer, head, target)
    _, config_class = get_sae_training_class(architecture)
    defaults: dict[str, Any] = {
        "model_name": model.model_name if collected else model.cfg.model_name,
        "model_class_name": MODEL_CLASS_NAME,
        "hook_name": place.hook_name,
        "seqpos_slice": place.seqpos_slice,
        "prepend_bos": False,
        "sequence_separator_token": None,
        "streaming": False,
        "is_dataset_tokenized": False,
        "device": "cpu" if collected else str(model.cfg.device),
        "logger": LoggingConfig(log_to_wandb=False),
        "n_checkpoints": 0,
        "checkpoint_path": None,
        "output_path": None,
        **RUNNER,
    }
    if collected:
        defaults |= {"use_cached_activations": True, "cached_activations_path": str(model.folder)}
        defaults["context_size"] = model.context_size
    if target == "last_state":  # a sequence gives one row, so that the buffer is counted in sequences
        defaults["n_batches_in_buffer"] = 4 * int(runner.get("train_batch_size_tokens", 256))
        defaults["train_batch_size_tokens"] = 256
    fields: dict[str, Any] = {
        **place.sae_fields,
        "d_sae": d_sae,
        "loss": loss,
        "loss_weight": loss_weight,
        "metric": metric,
        "decoder_init": "native",
        **({"k": 1} if architecture == "writesae_topk" else {}),
        **(sae or {}),
    }
    cfg = LanguageModelSAERunnerConfig(sae=config_class(**fields), **(defaults | runner))
    check_metric(cfg, None)
    if "lr_warm_up_steps" not in runner:
        cfg.lr_warm_up_steps = min(cfg.lr_warm_up_steps, cfg.training_tokens // cfg.train_batch_size_tokens // 10)
    _check_schedule(cfg)
    rows = cfg.n_batches_in_buffer * (1 if target == "last_state" else cfg.context_size)
    if rows < cfg.train_batch_size_tokens:
        raise ValueError(
            f"the activation buffer holds {rows} rows (n_batches_in_buffer {cfg.n_batches_in_buffer} x positions "
            f"kept per sequence), fewer than one batch of train_batch_size_tokens {cfg.train_batch_size_tokens}; raise "
            "n_batches_in_buffer"
        )
    return cfg


def _check_schedule(cfg: RunnerConfig) -> None:
    """Raise ValueError where warm-up and decay leave no step to a cosine, of which SAELens then divides by zero."""
    steps = cfg.training_tokens // cfg.train_batch_size_tokens
    if cfg.lr_scheduler_name != "constant" and cfg.lr_warm_up_steps + cfg.lr_decay_steps >= steps:
        raise ValueError(
            f"{steps} steps (training_tokens {cfg.training_tokens} / train_batch_size_tokens "
            f"{cfg.train_batch_size_tokens}) leave none to {cfg.lr_scheduler_name} after lr_warm_up_steps "
            f"{cfg.lr_warm_up_steps} and lr_decay_steps {cfg.lr_decay_steps}; train longer, or make those fewer"
        )


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
    """Turns SIGINT and SIGTERM into one KeyboardInterrupt, where nothing is lost by it.

    A signal waits for the end of the step: an optimizer goes through its parameters one by one, and what is saved in
    the middle of that has made the step with some of them only. While the buffer is filled it waits for the end of a
    batch of the language model; a second signal does not. Later ones do nothing, so that saving is not interrupted.
    After the last step a signal waits until the result is saved.
    """

    def __init__(self) -> None:
        self._signal: str | None = None
        self._raised = False
        self.in_step = False
        """Whether a step has begun and is not whole: then trainer and weights cannot be saved."""
        self.steps = 0
        """Steps that are whole."""
        self.trained = False
        """Whether the last step is made: then there is no checkpoint to resume from, and the result is soon saved."""
        self.filling: Callable[[], bool] = lambda: False
        """Whether the buffer is being filled: then an exception loses nothing wherever it comes."""

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
        self.steps = trainer.n_training_steps

        def whole_step(batch: Tensor) -> object:
            self.in_step = True
            with step_threads(trainer, batch.shape[1]):
                output = step(batch)
            self.steps += 1
            return output

        def between_steps() -> dict[str, Any]:
            self.in_step = False
            self.check()
            return begin()

        trainer.step, trainer.maybe_reset_sparsity = cast(Any, whole_step), between_steps

    def check(self) -> None:
        """Raise the KeyboardInterrupt that waits, if one does."""
        if self._signal is not None and not self._raised and not self.trained:
            self._raised = True
            raise KeyboardInterrupt(self._signal)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.filling():
            self.check()
        self._signal = self._signal or signal.Signals(number).name


_HALF_LIVES = 8
"""Sequences from which the half-life of a head is taken that is logged."""


class WriteSAETrainingRunner(LanguageModelSAETrainingRunner):
    """SAELens' runner with the losses of `sae.losses`, the metric of `sae.metric` and training on factors, in which the
    seed decides and nothing is lost by an interrupt.

    On one machine, one config gives one dictionary, bit for bit; another seed gives another. The caller's random
    numbers stay as they are. SIGINT and SIGTERM leave a whole checkpoint in `checkpoint_path/<samples>`, and a run with
    `resume_from_checkpoint` ends with the very dictionary of a run that was never stopped. Checkpoints are written
    aside and renamed. (SAELens' runner does not use its seed, saves nothing when it is interrupted, and resumes with
    other random numbers and an empty buffer.)

    With a Gauss-Newton metric, checkpoints hold weights for transformed writes and the metric beside them. The result,
    and what is saved to `output_path`, has the metric folded in.

    Args:
        metric: where `cfg.sae.metric` is `gauss_newton`, a metric that is already fitted. A collection, which comes
            without a model, needs one.
        overrides: `override_model`, `override_dataset`, `override_sae` of SAELens.

    Raises:
        ValueError: a metric that the config cannot have, or none where it needs one; a hook that does not fit the SAE;
            checkpoints beside `prefetch_llm_batches`, which draws batches before they are trained on, so that no
            checkpoint can tell them.
        CheckpointError: `resume_from_checkpoint` is not a whole checkpoint of a run with these settings.
    """

    def __init__(self, cfg: RunnerConfig, metric: Metric | None = None, **overrides: Any):
        check_metric(cfg, metric)
        self.cfg = cfg
        self._random, self._interrupts = RandomNumbers(cfg.seed), Interrupts()
        if cfg.prefetch_llm_batches and cfg.checkpoint_path is not None:
            raise ValueError(
                "prefetch_llm_batches draws batches before they are trained on, which a checkpoint cannot give back: "
                "set prefetch_llm_batches=False, or checkpoint_path=None for a run without checkpoints"
            )
        if cfg.resume_from_checkpoint is not None:
            check_checkpoint(Path(cfg.resume_from_checkpoint), cfg)
        with self._random.scope():
            # Before the model, whose loading may use random numbers.
            sae = overrides.pop("override_sae", None) or _initial_sae(cfg)
        with RandomNumbers(cfg.seed).scope():
            if (collection := collection_of(cfg)) is not None:
                self.sae, self.evaluator = sae.to(cfg.device), None  # pyright: ignore  (SAELens' trainer takes None)
                self._read_from(collection)
            else:
                super().__init__(cfg, override_sae=sae, **overrides)
                self._replace_store()
            self.metric = metric
            if getattr(cfg.sae, "metric", "frobenius") != "frobenius":
                self.metric = metric or self._earlier_metric() or self._fitted_metric()
            logged = cfg.logger.log_to_wandb and ".heads." in cfg.hook_name
            self._half_life = self._measured_half_life() if logged else None

    def _read_from(self, collection: Collection) -> None:
        """Take rows from a collection; there is no language model, and no evaluation that needs one."""
        cfg, source = self.cfg, CollectedRows(collection, self.cfg)
        held = cfg.n_batches_in_buffer * len(range(cfg.context_size)[slice(*cfg.seqpos_slice)])
        mixing = cfg.activations_mixing_fraction
        buffer = MixingBuffer(source, held, cfg.train_batch_size_tokens, mixing, cfg.seed)
        self._watch(buffer)
        self.activations_store = buffer  # pyright: ignore  (an iterator that is saved and loaded is all that is asked)

    def _replace_store(self) -> None:
        cfg, model = self.cfg, cast(HookedRecurrent, self.model)
        dataset = cast("Dataset | None", self.activations_store.dataset)
        paired = getattr(cfg.sae, "loss", "mse") != "mse" or self._on_factors
        make = PairedActivationsStore.paired if paired else SeededStore.seeded
        self.activations_store = store = make(model, cfg, dataset)
        self._watch(store.buffer)
        self.evaluator.activations_store = store

    def _compile_llm_if_needed(self) -> None:
        """SAELens would leave a compiled `run_with_cache` on the model, from which it gains nothing: every hook breaks
        the graph."""
        if self.cfg.compile_llm:
            sae_lens.logger.warning("compile_llm is ignored: hooks break the graph of a hooked model at every layer")

    def _watch(self, buffer: MixingBuffer) -> None:
        buffer.between_draws, self._interrupts.filling = self._interrupts.check, lambda: buffer.filling

    @property
    def _on_factors(self) -> bool:
        return getattr(self.cfg.sae, "inputs", "matrices") == "factors"

    def _earlier_metric(self) -> Metric | None:
        """The metric of the run that this one goes on with."""
        folder = self.cfg.resume_from_checkpoint
        return None if folder is None else Metric.load(Path(folder) / METRIC_FILENAME)

    def _fitted_metric(self) -> Metric:
        """Fit to sequences from all over the training text."""
        cfg, sae = self.cfg, cast(MatrixTrainingSAEConfig, self.cfg.sae)
        if collection_of(cfg) is not None:
            raise ValueError(
                "metric='gauss_newton' is fitted to a model, and a collection comes without one: give the metric that "
                "sae.metric_fit.fit_metrics returns for this head"
            )
        tokens = self._other_tokens(sae.metric_sequences)
        hook = HeadHook.parse(cfg.hook_name)
        head = (hook.layer, hook.head)
        model = cast(HookedRecurrent, self.model)
        return fit_metrics(model, tokens, [head], damping=sae.metric_damping, seed=cfg.seed)[head]

    def _other_tokens(self, n_sequences: int) -> Tensor:
        """Sequences from all over the training text [n_sequences,T], past the store, whose place in the text stays."""
        shuffled = cast(Dataset, self.activations_store.dataset).shuffle(seed=self.cfg.seed)
        store = ActivationsStore.from_config(self.model, self.cfg, override_dataset=shuffled)
        return store.get_batch_tokens(n_sequences)

    def _measured_half_life(self) -> float | None:
        """Tokens until a write of the head has lost half of its norm: the median over a few sequences. None where the
        collection has writes alone."""
        hook, collection = HeadHook.parse(self.cfg.hook_name), collection_of(self.cfg)
        if collection is not None:
            try:
                few = collection.recurrence(hook.layer, hook.head, slice(0, _HALF_LIVES))
            except CollectionError:
                return None
        else:
            model = cast(HookedRecurrent, self.model)
            few = model.recurrence(self._other_tokens(_HALF_LIVES), hook.layer).select(heads=hook.head)
        return float(torch.cat([half_lives(few.select(rows=slice(n, n + 1))) for n in range(few.B)]).median())

    def run(self) -> MatrixTrainingSAE:
        """Train and save. A signal that came within the last step or after it is raised when the result is saved."""
        with self._random.scope():
            sae = super().run()
        self._interrupts.trained = False
        self._interrupts.check()
        return cast(MatrixTrainingSAE, sae)

    def run_trainer_with_interruption_handling(self, trainer: Trainer) -> MatrixTrainingSAE:
        if self._on_factors:
            on_factors(trainer)
        if self.cfg.resume_from_checkpoint is not None:
            self._resume(trainer, Path(self.cfg.resume_from_checkpoint))
        if self.cfg.checkpoint_path is not None:
            trainer.save_checkpoint = functools.partial(self.save_whole_checkpoint, trainer)  # pyright: ignore
        if self._half_life is not None:
            wandb.log({"metrics/half_life": self._half_life}, step=trainer.n_training_steps)
        self._interrupts.watch(trainer)
        if self.metric is not None:
            put_in_metric(trainer, self.metric)
        with self._interrupts.handled():
            try:
                sae = cast(MatrixTrainingSAE, trainer.fit())
                self._interrupts.trained = True
                return sae if self.metric is None else self.metric.fold(sae)
            except KeyboardInterrupt:
                self._save_interrupted(trainer)
                raise

    def _resume(self, trainer: Trainer, checkpoint: Path) -> None:
        """Set what SAELens does not: random numbers, the number of steps (which SAELens saves before it counts the step
        that was made), the atoms that were put on rows, and the checkpoints that are still to come."""
        trainer.n_training_steps, started = load_run_state(checkpoint)
        trainer.sae.n_started = started
        passed = trainer.n_training_samples
        trainer.checkpoint_thresholds = [each for each in trainer.checkpoint_thresholds if each >= passed]

    def _save_interrupted(self, trainer: Trainer) -> None:
        if self.cfg.checkpoint_path is None:
            return
        if self._interrupts.in_step or trainer.n_training_samples == 0:
            sae_lens.logger.warning("interrupted before a step was whole: no checkpoint beyond those that are there")
            return
        folder = self.save_whole_checkpoint(trainer)
        sae_lens.logger.warning(f"interrupted; resume with resume_from_checkpoint={str(folder)!r}")

    def save_final_sae(self, sae: TrainingSAE[Any], output_path: str, *args: Any, **kwargs: Any) -> None:
        super().save_final_sae(sae, output_path, *args, **kwargs)
        if self.metric is not None:
            self.metric.save(Path(output_path) / METRIC_FILENAME)

    def save_whole_checkpoint(
        self, trainer: Trainer, checkpoint_name: str | None = None, wandb_aliases: list[str] | None = None
    ) -> Path:
        """Weights, optimizer, schedule, data position and random numbers, in `checkpoint_path/<name>`, which is whole
        or absent. The name is the number of samples, where none is given."""
        base = Path(cast(str, self.cfg.checkpoint_path))
        checkpoint_name = checkpoint_name or str(trainer.n_training_samples)
        target = base / checkpoint_name
        base.mkdir(parents=True, exist_ok=True)
        with named_errors(target), tempfile.TemporaryDirectory(dir=base, prefix=ASIDE_PREFIX) as aside:
            SAETrainer.save_checkpoint(trainer, checkpoint_name, base_path=aside, wandb_aliases=wandb_aliases)
            if not target.exists():
                whole = Path(aside) / checkpoint_name
                write_checksums(whole, sorted(file.name for file in whole.iterdir() if file.name != CHECKSUMS))
                os.replace(whole, target)
        return target

    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        """SAELens calls this when a checkpoint has its own files."""
        super().save_checkpoint(checkpoint_path)
        if checkpoint_path is not None:
            save_run_state(checkpoint_path, self._interrupts.steps, getattr(self.sae, "n_started", None))
            if self.metric is not None:
                self.metric.save(Path(checkpoint_path) / METRIC_FILENAME)


def _initial_sae(cfg: RunnerConfig) -> TrainingSAE[Any]:
    """What training begins with, as SAELens makes it."""
    if cfg.from_pretrained_path is not None:
        return cast("TrainingSAE[Any]", load_sae(cfg.from_pretrained_path, cfg.device, training=True))
    return TrainingSAE.from_dict(TrainingSAEConfig.from_dict(cfg.get_training_sae_cfg_dict()).to_dict())


def collection_of(cfg: RunnerConfig) -> Collection | None:
    """The collection that a config names as its cached activations; None where these are SAELens' or none."""
    path = cfg.cached_activations_path
    if not cfg.use_cached_activations or path is None or not (Path(path) / INDEX).is_file():
        return None
    return Collection.open(path)


class FrugalRunner(WriteSAETrainingRunner):
    """Keeps the newest two checkpoints; for a wide SAE each is gigabytes."""

    def save_whole_checkpoint(
        self, trainer: Trainer, checkpoint_name: str | None = None, wandb_aliases: list[str] | None = None
    ) -> Path:
        saved = super().save_whole_checkpoint(trainer, checkpoint_name, wandb_aliases)
        for old in whole_checkpoints(saved.parent.parent)[:-2]:
            shutil.rmtree(old)
        return saved


def whole_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints below `folder` by samples seen. They are renamed when they are whole; what a kill left aside is
    passed over."""
    found = [file.parent for file in folder.rglob(RUNNER_CFG_FILENAME)]
    whole = [each for each in found if not each.parent.name.startswith(ASIDE_PREFIX)]
    return sorted(whole, key=lambda path: int(path.name.rpartition("_")[2]))


def train(
    cfg: RunnerConfig,
    model: HookedRecurrent | None = None,
    dataset: Dataset | None = None,
    metric: Metric | None = None,
) -> MatrixTrainingSAE:
    """Train an SAE with SAELens and return it, still of its training class.

    `model` and `dataset` override those that the config names; with a collection, as `training_config(collection, ...)`
    names it, neither is used. Where the config has metric='gauss_newton', a `metric` that is given is used instead of a
    new fit, and the result has it folded in. For an architecture of SAELens the result is of SAELens' class.
    """
    return WriteSAETrainingRunner(cfg, metric, override_model=model, override_dataset=dataset).run()


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
With --inputs factors writes are not built as matrices, and the same steps take a fraction of the time and memory.
With --use_cached_activations true --cached_activations_path FOLDER it trains from what `writesae collect` wrote,
without the language model. An interrupted run leaves a whole checkpoint in --checkpoint_path;
--resume_from_checkpoint goes on from it.
"""


def train_from_arguments(arguments: Sequence[str]) -> MatrixTrainingSAE:
    """Parse SAELens' flags and train. Without arguments, or with --help, prints a guide and the flags."""
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(_GUIDE)
    cfg = _parse_cfg_args(list(arguments))
    dataset = text_dataset(embedded.text("train")) if cfg.dataset_path == "embedded" else None
    model = None
    if cfg.model_class_name == MODEL_CLASS_NAME and collection_of(cfg) is None:
        # Loaded here, so that a wrong hook or size is reported before SAELens fills a buffer.
        kwargs = cfg.model_from_pretrained_kwargs
        model = HookedRecurrent.from_pretrained(cfg.model_name, device=cfg.llm_device, **(kwargs or {}))
    return train(cfg, model, dataset)
