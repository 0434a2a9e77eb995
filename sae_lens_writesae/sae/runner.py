"""Training through SAELens: recurrent models by class name, configs for a head, and `train`.

SAELens' own `LanguageModelSAETrainingRunner` trains every architecture of this package, unchanged. What it has no place
for (rows with further columns, a metric, training without the language model) is trained from data at hand: `sae.fast`
on factors, many dictionaries at once, or `sae.rows`, which gives SAELens' trainer the rows. `engine_of` says which.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, overload

import sae_lens.cache_activations_runner
import sae_lens.llm_sae_training_runner
import sae_lens.load_model
import sae_lens.multi_sae_training_runner
import torch
from sae_lens import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
)
from sae_lens.config import HfDataset
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor
from transformer_lens import HookedRootModule

from hookpoints import HookedRecurrent, default_device
from hookpoints.errors import with_fields
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.atom.mapped import CollectedWrites, Writes
from sae_lens_writesae.choices import Loss, MetricName
from sae_lens_writesae.sae.architectures import training_config_class
from sae_lens_writesae.sae.factors import INDEX, Collection
from sae_lens_writesae.sae.fast import Stack, shape_of, writes_at_hand
from sae_lens_writesae.sae.metric import Metric
from sae_lens_writesae.sae.rows import rows_of_collection, rows_of_writes, seeded, train_on_rows
from sae_lens_writesae.sae.target import (
    Dictionary,
    HeadHook,
    RunnerConfig,
    Target,
    check_hook,
    check_sizes,
    head_target,
)
from sae_lens_writesae.sae.training import MatrixTrainingSAE

T = TypeVar("T")

MODEL_CLASS_NAME = "HookedRecurrent"
"""The `model_class_name` with which SAELens' runners load a hookpoints model."""

# ------------------------------------------------------------------------------------------------ models by name

_load_model: Callable[..., HookedRootModule] = sae_lens.load_model.load_model


@functools.wraps(_load_model)
def load_model(
    model_class_name: str,
    model_name: str,
    device: str | torch.device | None = None,
    model_from_pretrained_kwargs: dict[str, Any] | None = None,
    **kwargs: object,
) -> HookedRootModule:
    """SAELens' `load_model`, which knows `HookedRecurrent` too. SAELens loads models by a fixed chain of names, with no
    registry to add to."""
    if model_class_name == MODEL_CLASS_NAME:
        return HookedRecurrent.from_pretrained(model_name, device=device, **(model_from_pretrained_kwargs or {}))
    return _load_model(model_class_name, model_name, device, model_from_pretrained_kwargs, **kwargs)


for _module in (  # those that bind it by name
    sae_lens.load_model,
    sae_lens.llm_sae_training_runner,
    sae_lens.cache_activations_runner,
    sae_lens.multi_sae_training_runner,
):
    _module.load_model = load_model  # type: ignore[attr-defined]

# ------------------------------------------------------------------------------------------------ sizes of heads


def _hooked_saes(runner: Any) -> list[tuple[str, Dictionary]]:
    """The SAEs of a runner, each with its hook."""
    if isinstance(runner, MultiSAETrainingRunner):
        return [(runner.cfg.hook_names_per_sae[name], sae) for name, sae in runner.saes.items()]
    return [(runner.cfg.hook_name, runner.sae)]


def _checked_run(run: Callable[[Any], T]) -> Callable[[Any], T]:
    """The `run` of a runner, which first compares its SAEs with the heads of the model. SAELens compares `d_in` alone,
    and nothing else in it knows both the model and the SAE."""

    @functools.wraps(run)
    def checked(self: Any) -> T:
        if isinstance(self.model, HookedRecurrent):
            for hook_name, sae in _hooked_saes(self):
                check_hook(self.model, hook_name, sae.cfg)
        return run(self)

    return checked


for _runner in (LanguageModelSAETrainingRunner, MultiSAETrainingRunner):
    _runner.run = _checked_run(_runner.run)  # type: ignore[method-assign, assignment]

# ------------------------------------------------------------------------------------------------ configs and data

RUNNER: dict[str, float | int | str] = {
    "lr": 3e-3,
    "lr_scheduler_name": "cosineannealing",
    "lr_warm_up_steps": 20,
    "train_batch_size_tokens": 128,
    "dead_feature_window": 200,
}
"""Settings of SAELens' runner for dictionaries of writes. On twelve heads of three models (2026-11-26, three seeds)
no other rate, start, number of steps or centering was better on any head."""


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

    What is not given is `RUNNER`, a start from native writes, and for TopK one active atom. `PAPER_RUNNER` has the
    paper's settings.

    Args:
        model: the language model, or a collection of its factors, with which no language model is loaded.
        target: what is learned; see `sae.target.Target`.
        architecture: one of matrix atoms, such as `writesae_batchtopk`.
        d_sae: number of atoms F.
        metric: `gauss_newton` trains in the metric of the model's own KL divergence instead of squared errors (writes
            only; see `sae.metric`). It needs a collection, and `train` with the metric.
        loss: `reads` or `write` mix in what queries read, or atoms along the write, with the share `loss_weight` (see
            `sae.training`). These two need a collection, because SAELens' own runner lacks what they compare with.
        sae: further fields of the SAE's config, such as `{"k": 32, "encoder": "tied"}`.
        runner: further fields of `LanguageModelSAERunnerConfig`, such as `training_tokens`. By default `device` is that
            of the model, and with a collection `hookpoints.default_device()`.

    Raises:
        ValueError: a metric of states, a field that a config lacks, and what `training_config_class`, `head_target` and
            the configs raise.
    """
    if metric != "frobenius" and target != "write":
        raise ValueError(f"metric: expected frobenius for {target}, got {metric!r}")
    collected = isinstance(model, Collection)
    place = model.head_target(layer, head, target) if collected else head_target(model, layer, head, target)
    config_class = training_config_class(architecture)
    origin = model.origin()
    defaults: dict[str, Any] = {
        "model_name": origin["model_name"],
        "model_from_pretrained_kwargs": {"revision": origin["revision"]} if origin["revision"] else {},
        "model_class_name": MODEL_CLASS_NAME,
        "hook_name": place.hook_name,
        "seqpos_slice": place.seqpos_slice,
        "prepend_bos": False,
        "sequence_separator_token": None,
        "streaming": False,
        "is_dataset_tokenized": False,
        "device": default_device() if collected else str(model.cfg.device),
        "logger": LoggingConfig(log_to_wandb=False),
        "checkpoint_path": None,
        "output_path": None,
        **RUNNER,
    }
    if collected:
        defaults |= {
            "use_cached_activations": True,
            "cached_activations_path": str(model.folder),
            "context_size": model.context_size,
        }
    if target == "last_state":  # a sequence gives one row, so that the buffer is counted in sequences
        defaults |= {
            "n_batches_in_buffer": 4 * int(runner.get("train_batch_size_tokens", 256)),
            "train_batch_size_tokens": 256,
        }
    fields: dict[str, Any] = {
        **place.sae_fields,
        "d_sae": d_sae,
        "loss": loss,
        "loss_weight": loss_weight,
        "metric": metric,
        "decoder_init": "native",
        "metadata": SAEMetadata(model_fingerprint=origin["fingerprint"]),
        **({"k": 1} if architecture == "writesae_topk" else {}),
        **(sae or {}),
    }
    cfg = with_fields(LanguageModelSAERunnerConfig, {"sae": with_fields(config_class, fields), **defaults, **runner})
    if "lr_warm_up_steps" not in runner:  # a short run would end in its warm-up
        steps = cfg.training_tokens // cfg.train_batch_size_tokens
        cfg.lr_warm_up_steps = min(cfg.lr_warm_up_steps, steps // 10)
    return cfg


# ------------------------------------------------------------------------------------------------ running

Data = tuple[HookedRecurrent, HfDataset | None] | Collection | LowRank | Tensor | None
"""What `train` takes."""


@overload
def train(
    cfg: RunnerConfig,
    data: Data = None,
    *,
    metric: Metric | None = None,
    checkpoint: Path | None = None,
) -> MatrixTrainingSAE: ...
@overload
def train(
    cfg: Sequence[RunnerConfig],
    data: Sequence[Data],
    *,
    metric: Sequence[Metric | None] | None = None,
    checkpoint: Path | None = None,
) -> list[MatrixTrainingSAE]: ...
def train(
    cfg: Any, data: Any = None, *, metric: Any = None, checkpoint: Path | None = None
) -> MatrixTrainingSAE | list[MatrixTrainingSAE]:
    """Train an SAE and return it, still of its training class; of several configs with data each, all of them.

    The seed of the config draws initial atoms, the order of the rows and resampled atoms: the same seed gives bitwise
    the same dictionary (on one machine and number of threads), and the caller's random numbers stay as they are. On
    CUDA atoms sum their gradients in no fixed order (`index_add_`), so that two runs differ by rounding.

    Dictionaries with one `fast.shape_of` train in one step on factors; seeds, heads and `k` may differ. More than
    `MAX_STACK` save nothing.

    Args:
        cfg: SAELens' runner config; `training_config` makes one for a head of a model. Its `training_tokens` are rows
            seen, in as many epochs as that needs. Where data are at hand, its model and its text are not used.
        data: (model, text) for SAELens' own runner, (model, None) for the text that the config names;
            a `Collection`; writes, as a `LowRank`; matrices [N,K,V], such as states, of any float dtype. None: what the
            config names, which is a collection (of `training_config(collection, ...)`), or else a model and a text.
        metric: where `cfg.sae.metric` is `gauss_newton`, the metric of this head (`sae.metric_fit.fit_metrics`). The
            dictionary that is returned has it folded in. Not with SAELens' runner.
        checkpoint: a folder that is written every minute, from which the same call resumes after a kill, to the same
            weights. It is removed at the end. Not with SAELens' runner, and of several configs for one `shape_of`.

    Raises:
        ValueError: a metric that the config cannot have, or none where it needs one; data of another shape than the
            config's; a loss or context that a collection lacks; a checkpoint of other settings or inputs; NaN or
            infinite values.
        OSError: the checkpoint is a folder of something else.

    Cost of a step on writes: F*R*S*(K+V) operations a row, and k*k*R*R*(K+V) for the selected atoms; on matrices F*K*V.
    Memory: a batch. The writes of a collection stay on disk, which may be larger than memory.
    """
    if not isinstance(cfg, Sequence):
        return train([cfg], [data], metric=[metric], checkpoint=checkpoint)[0]
    metrics = metric or [None] * len(cfg)
    sources = [source_of(each, rows) for each, rows in zip(cfg, data, strict=True)]
    engines: list[Engine] = [engine_of(each, source) for each, source in zip(cfg, sources)]
    # Dictionaries of one shape train in one step on factors; every other one trains alone.
    groups: dict[object, list[int]] = {}
    for n, engine in enumerate(engines):
        groups.setdefault(shape_of(cfg[n]) if engine == "factors" else n, []).append(n)
    if checkpoint is not None and len(groups) > 1:
        raise ValueError(f"checkpoint: expected dictionaries of one shape, got {len(groups)}; train each by itself")
    trained: dict[int, MatrixTrainingSAE] = {}
    for members in groups.values():
        configs, writes, of_group = ([values[n] for n in members] for values in (cfg, sources, metrics))
        trained |= zip(members, _ENGINES[engines[members[0]]](configs, writes, of_group, checkpoint))
    return [trained[n] for n in range(len(cfg))]


Source = Writes | Collection | tuple[HookedRecurrent | None, HfDataset | None]
"""What a dictionary is trained on: writes, a collection of states, or what SAELens' runner runs."""


def source_of(cfg: RunnerConfig, data: Data) -> Source:
    """What the dictionary of a config is trained on, which has its sizes."""
    cached = Path(cfg.cached_activations_path or "")
    # Without the index, what a config names as cached is SAELens' own.
    if data is None and cfg.use_cached_activations and (cached / INDEX).is_file():
        data = Collection.open(cached)
    if isinstance(data, Tensor):  # a matrix is the sum of its rows
        keys = torch.eye(data.shape[1], dtype=data.dtype, device=data.device)
        data = LowRank(keys.expand(len(data), -1, -1), data)
    if isinstance(data, LowRank):
        check_sizes(cfg.sae, data.keys.shape[2], data.values.shape[2], "the data")
    if not isinstance(data, Collection):
        return (None, None) if data is None else data
    hook = HeadHook.parse(cfg.hook_name)
    place = data.head_target(hook.layer, hook.head, hook.target)
    check_sizes(cfg.sae, place.d_k, place.d_v, f"{hook.name} of {data.model_name}")
    if cfg.exclude_special_tokens or cfg.context_size != data.context_size:
        raise ValueError(
            f"context_size, exclude_special_tokens: expected {data.context_size} and False, as the collection has, got "
            f"{cfg.context_size} and {cfg.exclude_special_tokens}"
        )
    if hook.target != "write" or cfg.sae.loss == "reads":
        return data
    name = f"{data.sha256} {hook.layer}.{hook.head}"
    return CollectedWrites(name, *data.factors(hook.layer, hook.head))


Engine = Literal["factors", "rows", "runner"]
"""What trains: the loop of `sae.fast` on factors, SAELens' trainer on rows at hand, or SAELens' own runner."""


def engine_of(cfg: RunnerConfig, source: Source) -> Engine:
    """What trains the dictionary of a config.

    In numbers, for a step of TopK on states of 128 x 128 (F 2048, k 32, N 128): 1.2 s on rows, 0.36 s on factors, where
    a state at hand is the sum of its K rows. BatchTopK would gather K times as many products, and takes rows.
    """
    if isinstance(source, tuple):
        return "runner"
    many_products = "hook_state" in cfg.hook_name and cfg.sae.architecture() == "writesae_batchtopk"
    if isinstance(source, Collection) or shape_of(cfg) is None or many_products:
        return "rows"
    return "factors"


def _on_factors(configs: Any, sources: Any, metrics: Any, checkpoint: Path | None) -> list[MatrixTrainingSAE]:
    return Stack(configs, writes_at_hand(sources, torch.device(configs[0].device)), metrics).train(checkpoint)


def _on_rows(configs: Any, sources: Any, metrics: Any, checkpoint: Path | None) -> list[MatrixTrainingSAE]:
    (cfg,), (source,), (metric,) = configs, sources, metrics
    rows = rows_of_collection(cfg, source) if isinstance(source, Collection) else rows_of_writes(cfg, source)
    return [train_on_rows(cfg, rows, metric, checkpoint)]


def _by_runner(configs: Any, sources: Any, metrics: Any, checkpoint: Path | None) -> list[MatrixTrainingSAE]:
    if metrics[0] is not None or checkpoint is not None:
        raise ValueError("metric, checkpoint: expected a collection or data at hand, got those of SAELens' own runner")
    with seeded(configs[0].seed, 0):
        model, text = sources[0]
        runner = LanguageModelSAETrainingRunner(configs[0], override_model=model, override_dataset=text)
        return [cast(MatrixTrainingSAE, runner.run())]


_ENGINES: dict[Engine, Callable[..., list[MatrixTrainingSAE]]] = {
    "factors": _on_factors,
    "rows": _on_rows,
    "runner": _by_runner,
}
