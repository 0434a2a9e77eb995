"""`writesae collect`: one pass of a model for many heads. `writesae train`: many dictionaries from it, in one process.

Each dictionary is in its folder when it is whole, so that the same command resumes where it was stopped or killed.
"""

from __future__ import annotations

import itertools
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import tyro

from writesae.choices import MATCHED, DictionaryName, Dtype, Loss, MetricName, Target, at_least, expect, once_each
from writesae.files import check_settings, check_writable, keep_settings, taken

if TYPE_CHECKING:
    from datasets import Dataset

    from hookpoints import HookedRecurrent
    from sae_lens_writesae.sae.factors import Collection
    from sae_lens_writesae.sae.metric import Metric
    from sae_lens_writesae.sae.target import RunnerConfig
    from sae_lens_writesae.sae.training import MatrixTrainingSAE

Say = Callable[[str], object]
Head = tuple[int, int]
"""Layer and head."""

_SIZES = ("d_sae", "k", "training_tokens", "train_batch_size_tokens")
_WRITES_IN_MEMORY = 4_000_000_000
"""Bytes of the writes that are trained on at once."""
_WRITTEN = ("sae", "checkpoint")
"""What the folder of a dictionary has besides its settings."""
_METRIC_TOKENS = 32_768
"""Tokens on which a metric is fitted."""


@dataclass(frozen=True, kw_only=True)
class Collect:
    """Run a language model over a text once, and write the factors of the heads' recurrences to disk. Any number of
    dictionaries train from them, without the language model (`writesae train --collection OUT`).

    The size is said beforehand. The same command resumes where it was stopped or killed."""

    model: str
    """Model on the hub, a folder, or one that ships with the package (embedded, embedded-mamba2, embedded-rwkv7)."""
    layers: Annotated[tuple[int, ...], tyro.conf.arg(aliases=("--layer",))]
    """Recurrent layers."""
    heads: Annotated[tuple[int, ...], tyro.conf.arg(aliases=("--head",))] = ()
    """Heads of every layer; none named: all of them."""
    n_tokens: int | None = None
    """Tokens of text, rounded down to whole sequences; by default the whole text."""
    out: Path = Path("writesae-out/collection")
    """Folder of the collection."""
    targets: tuple[Target, ...] = ("write",)
    """What dictionaries will be trained on. States need reads, decays and erases besides the writes."""
    context_size: int = 128
    """Tokens per sequence."""
    dataset: str | None = None
    """Text file, folder of `.txt` files, or dataset with a column `text` on the hub or in a folder; by default the
    held-out text of this package, which is enough for the models that ship with it."""
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """Of the stored vectors; auto: the smallest that is safe on a first batch."""
    model_dtype: Dtype = "float32"
    """The model's dtype."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""

    def __post_init__(self) -> None:
        at_least(self, {"n_tokens": 1, "context_size": 1})

    def run(self, say: Say = print) -> Path:
        """Collect; returns the folder."""
        from hookpoints import HookedRecurrent

        check_writable(self.out)
        check_text(self.model, self.dataset)
        model = HookedRecurrent.from_pretrained(self.model, dtype=self.model_dtype, revision=self.revision)
        return self.of(model, enough(documents(self.dataset), self.n_tokens, model), say)

    def of(self, model: HookedRecurrent, text: Dataset, say: Say = print) -> Path:
        """Collect from a model that is loaded; returns the folder."""
        from sae_lens_writesae.sae.collecting import check_own, collect
        from sae_lens_writesae.sae.target import head_target

        for layer, head in itertools.product(self.layers, self.heads):
            head_target(model, layer, head)
        check_own(self.out)
        with taken(self.out, say):
            collect(
                model,
                text,
                self.layers,
                self.heads or None,
                self.out,
                n_tokens=self.n_tokens,
                context_size=self.context_size,
                targets=self.targets,
                dtype=self.dtype,
                say=say,
            )
        return self.out


def check_text(model: str, dataset: str | None) -> None:
    """Raise where the model cannot be had or hooked, or the text of this package is not enough; reads no weights."""
    from hookpoints import HookedRecurrent, embedded

    HookedRecurrent.from_pretrained(model, device="meta")
    if dataset is None and model not in embedded.names():
        raise ValueError(
            "dataset: expected a text file, a folder of them, or a dataset with a column `text`, got none; the text of "
            f"the package is enough for {', '.join(embedded.names())} alone, not for {model}"
        )


def documents(dataset: str | None) -> Iterator[str]:
    """The texts of a text file, of the `.txt` files of a folder, or of a dataset on the hub or in a folder; None: the
    held-out text of this package.

    Raises:
        ValueError: a file is not in UTF-8.
    """
    from datasets import load_dataset

    from hookpoints import embedded
    from sae_lens_writesae.sae.runner import text_dataset
    from writesae.experiment.tokens import text_of

    place = Path(dataset or "")
    files = [place] if place.is_file() else sorted(place.glob("*.txt")) if dataset else []
    if dataset and not files:
        yield from (str(row["text"]) for row in load_dataset(dataset, split="train", streaming=True))
    for text in map(text_of, files) if dataset else [embedded.text("train")]:
        yield from text_dataset(text)["text"]


def enough(texts: Iterable[str], n_tokens: int | None, model: HookedRecurrent) -> Dataset:
    """The first texts that have `n_tokens` tokens between them, or all."""
    from datasets import Dataset

    first_texts = []
    total = 0
    for text in texts:
        first_texts.append(text)
        total += model.to_tokens(text, prepend_bos=False, truncate=False).shape[1]
        if n_tokens is not None and total >= n_tokens:
            break  # a dataset on the hub is streamed, and may have no end that is worth waiting for
    return Dataset.from_dict({"text": first_texts})


@contextmanager
def quiet() -> Iterator[None]:
    """Silence SAELens' warnings in this scope. It warns that a run with a given model and text cannot be repeated from
    its config alone, which does not concern callers that save their settings."""
    from hookpoints.errors import DamageWarning

    logger = logging.getLogger("sae_lens")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            warnings.simplefilter("default", DamageWarning)
            yield
    finally:
        logger.setLevel(level)


def save_dictionary(sae: MatrixTrainingSAE, folder: Path) -> None:
    """Leave a dictionary in FOLDER/sae, whole or not at all. What is there is not replaced."""
    from hookpoints.files import atomic_folder

    atomic_folder(folder / "sae", lambda aside: sae.save_inference_model(str(aside)), lambda there: ())


def quality_table(qualities: Mapping[str, object]) -> str:
    """What dictionaries recover on held-out text (fields of `DictionaryQuality` by label) as lines; a dash for None."""
    from writesae.page.template import share_text

    columns = {"explained": "explained variance (1 - error)", "alive": "alive atoms", "recovered": "recovered KL"}
    rows = [("held-out text", *columns.values())]
    for label, quality in qualities.items():
        shares = cast(dict, quality or {})
        rows.append((label, *(share_text(shares.get(name)) for name in columns)))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train dictionaries on heads of a model: every target, loss, variant and seed of every head that is named.

    Each dictionary is saved in OUT/L{layer}H{head}/{name}/sae, whole or not at all. The same command resumes where it
    was stopped or killed, and trains nothing twice."""

    model: str | None = None
    """Model on the hub, a folder, or one that ships with the package (embedded, embedded-mamba2, embedded-rwkv7). It
    runs once, for all dictionaries."""
    collection: Path | None = None
    """Folder that `writesae collect`, `train`, `demo` or `reproduce` wrote instead of a model; by default the model's
    is made in OUT/collection."""
    layers: Annotated[tuple[int, ...], tyro.conf.arg(aliases=("--layer",))] = ()
    """Recurrent layers; by default those of the collection."""
    heads: Annotated[tuple[int, ...], tyro.conf.arg(aliases=("--head",))] = ()
    """Heads of every layer; by default those of the collection."""
    targets: Annotated[tuple[Target, ...], tyro.conf.arg(aliases=("--target",))] = ("write",)
    """What dictionaries are trained on."""
    losses: Annotated[tuple[Loss, ...], tyro.conf.arg(aliases=("--loss",))] = ("mse",)
    """What they are trained for."""
    variants: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--variant",))] = ("WriteSAE",)
    """How they are built: of `sae_lens_writesae.VARIANTS`, or FlatSAE-matched, a flat SAE with as many parameters as
    the WriteSAE has."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(aliases=("--seed",))] = (0,)
    """Seeds of weights and data order."""
    metric: MetricName = "frobenius"
    """What errors are measured by: their squares, or the KL divergence that they cause in the model (gauss_newton, for
    writes alone). The latter is fitted to the model, which is loaded for it."""
    names: tuple[str, ...] = ()
    """Dictionaries by name, instead of targets, losses, variants, seeds and the metric: write-seed0
    state-reads-seed0 write-gauss_newton-seed0."""
    dataset: str | None = None
    """Text file, folder of `.txt` files, or dataset with a column `text` on the hub or in a folder; by default the
    held-out text of the package, which is enough for the models that ship with it."""
    architecture: str = "writesae_topk"
    """Architecture of the dictionaries, as SAELens names it."""
    d_sae: int = 2048
    """Atoms of a dictionary."""
    k: int = 1
    """Active atoms per token; architectures that have no k take no notice of it."""
    decoder_init: Literal["native", "random"] = "native"
    """Directions of the atoms before training: rows of the first batches, or random (the paper's)."""
    normalize_activations: Literal["none", "expected_average_only_in"] = "none"
    """Whether inputs are scaled to a mean norm of sqrt(d_in), as SAELens does it; the factor is folded in."""
    training_tokens: int = 256_000
    """Tokens that each dictionary is trained on; a shorter text is gone over again."""
    train_batch_size_tokens: int = 128
    """Rows of an optimizer step."""
    lr: float = 3e-3
    """Learning rate of Adam."""
    context_size: int = 1024
    """Tokens per sequence; that of a collection holds."""
    dtype: Dtype = "float32"
    """The model's dtype."""
    out: Path = Path("writesae-out/saes")
    """Folder of the dictionaries."""
    summary: bool = True
    """End with a table of what the dictionaries recover on held-out text, for which the model is loaded again."""

    def __post_init__(self) -> None:
        once_each(self, ("layers", "heads"), ("targets", "losses", "variants", "seeds"))
        at_least(self, dict.fromkeys((*_SIZES, "context_size"), 1) | {"seeds": 0})
        in_metric = [name for name in self.dictionaries() if name.metric != "frobenius"]
        refused = [str(name) for name in in_metric if not name.on_factors]
        one_source = (self.model is None) != (self.collection is None)
        expect(
            self, {"model": (one_source, "a model to be run over text, or a collection that it left; one of the two")}
        )
        has_heads = self.model is None or bool(self.layers and self.heads)
        expect(self, {"heads": (has_heads, "layers and heads of the model")})
        expect(self, {"metric": (not refused, f"frobenius, or writes instead of {', '.join(refused)}")})

    def dictionaries(self) -> list[DictionaryName]:
        """What is trained on each head."""
        if self.names:
            return [DictionaryName.parse(name) for name in self.names]
        names = []
        for combination in itertools.product(self.targets, self.losses, self.variants, self.seeds):
            name = DictionaryName(*combination, metric=self.metric)
            names.append(DictionaryName.parse(str(name)))  # which refuses a variant that is not there
        return names

    def run(self, say: Say = print) -> Path:
        """Train what is missing.

        Raises:
            ValueError, UnsupportedModelError, UnknownHookError: a head that is not there, a text or a folder that
                cannot be used; before any training.
        """
        check_writable(self.out)
        if self.collection is not None and not self.collection.is_dir():
            raise ValueError(f"collection: expected the folder of one, got {self.collection}, which does not exist")
        from writesae.dictionary.traits import sparsity_fields

        sparsity_fields(self.architecture, self.k)  # raises where there is no such architecture
        names = (*_SIZES, "architecture", "decoder_init", "normalize_activations", "lr")
        settings = {name: getattr(self, name) for name in names}
        for layer, head, name in itertools.product(self.layers, self.heads, self.dictionaries()):
            check_settings(self.out / f"L{layer}H{head}" / str(name), settings, _WRITTEN)
        collection = self._collection(say)
        layers = self.layers or tuple(collection.heads)
        heads = self.heads or tuple(collection.heads[layers[0]])
        settings |= {"model": collection.model_name, "collection": collection.sha256[:16]}
        configs = {}
        for layer, head, name in itertools.product(layers, heads, self.dictionaries()):
            folder = self.out / f"L{layer}H{head}" / str(name)
            check_settings(folder, settings, _WRITTEN)
            configs[folder] = self.training_config(collection, layer, head, name)
        untrained = [folder for folder in configs if not (folder / "sae").exists()]
        say(f"{len(configs)} dictionaries, {len(configs) - len(untrained)} of them trained already")
        groups = [group for group in _groups(configs, collection) if not {*untrained}.isdisjoint(group)]
        metrics = self._metrics([configs[folder] for group in groups for folder in group], collection)
        for group in groups:
            with taken(group[0], say):
                missing = [folder for folder in group if not (folder / "sae").exists()]
                for folder in missing:
                    keep_settings(folder, settings, _WRITTEN)
                if missing:
                    _train(collection, {folder: configs[folder] for folder in group}, metrics)
                    names = ", ".join(str(folder.relative_to(self.out)) for folder in missing)
                    n_trained = sum((folder / "sae").exists() for folder in untrained)
                    say(f"{names}  {n_trained} of {len(untrained)}")
        if self.summary:
            say(self._summary([folder / "sae" for folder in configs]))
        return self.out

    def _summary(self, folders: Sequence[Path]) -> str:
        """What the dictionaries are worth on 8 sequences of 128 tokens of the package's held-out text, as a table. None
        is begun after a minute. A model that cannot be loaded is no error, for the dictionaries are saved."""
        from hookpoints import HookpointsError, embedded
        from sae_lens_writesae.sae.load import load_sae, model_of
        from writesae.dictionary.quality import quality_of_heads
        from writesae.experiment.tokens import sample_sequences

        end = time.monotonic() + 60
        saes = {str(each.parent.relative_to(self.out)): load_sae(each) for each in folders}
        try:
            model = model_of([*saes.values()], dtype=self.dtype)
        except (OSError, HookpointsError) as error:
            return f"no summary: {error}"
        quality = quality_of_heads(model, saes, sample_sequences(model, embedded.text("test"), 128, 8))
        return quality_table({label: quality(label) if time.monotonic() < end else None for label in saes})

    def _collection(self, say: Say) -> Collection:
        """The one that is there, of this model and text where they are named, or the model's, made now.

        Raises:
            CollectionError: it is of other weights, another dtype, another text or other contexts; says of which.
        """
        from hookpoints import HookedRecurrent
        from sae_lens_writesae.sae.factors import Collection, CollectionError

        folder = self.collection or self.out
        folder = folder / "collection" if self.collection is None or (folder / "collection").is_dir() else folder
        if self.model is None:
            return Collection.open(folder)
        with suppress(CollectionError):  # none yet
            name = Collection.open(folder).model_name
            if name not in (self.model, str(Path(self.model).resolve())):
                raise ValueError(f"{folder} is of the model {name}, not {self.model}; name another --out")
        check_text(self.model, self.dataset)
        model = HookedRecurrent.from_pretrained(self.model, dtype=self.dtype)
        text = enough(documents(self.dataset), self.training_tokens, model)
        try:
            return Collection.open(folder, model=model, text=text, context_size=self.context_size)
        except CollectionError:  # not finished, or of something else, which `collect` names
            names = self.dictionaries()
            needed: set[Target] = {name.target for name in names}
            needed |= {"state"} if any(name.loss == "reads" for name in names) else set()
            Collect(
                model=self.model,
                layers=self.layers,
                heads=self.heads,
                targets=tuple(sorted(needed)),
                context_size=self.context_size,
                out=folder,
            ).of(model, text, say)
            return Collection.open(folder)

    def _metrics(self, configs: Sequence[RunnerConfig], collection: Collection) -> Mapping[Head, Metric]:
        """The metrics of heads that need one, fitted on the first of the training text; the same each time."""
        from hookpoints import HookedRecurrent
        from sae_lens_writesae.sae.metric_fit import fit_metrics

        heads = {_head(config) for config in configs if config.sae.metric != "frobenius"}
        if not heads:
            return {}
        n_sequences = max(1, _METRIC_TOKENS // collection.context_size)
        model = HookedRecurrent.from_pretrained(
            collection.model_name, dtype=self.dtype, revision=collection.origin()["revision"]
        )
        return fit_metrics(model, collection.tokens[:n_sequences], sorted(heads))

    def training_config(self, collection: Collection, layer: int, head: int, name: DictionaryName) -> RunnerConfig:
        """SAELens' config for one dictionary. Raises what `head_target` and the configs raise."""
        from sae_lens.registry import get_sae_training_class

        from hookpoints import default_device
        from sae_lens_writesae.choices import VARIANTS
        from sae_lens_writesae.sae.runner import training_config
        from writesae.dictionary.traits import matched_flat, sparsity_fields

        batch = self.train_batch_size_tokens
        d_sae = self.d_sae
        buffered = max(2, -(-8 * batch // collection.context_size))  # sequences
        sparsity = sparsity_fields(self.architecture, self.k)
        if name.variant == MATCHED:
            sae_class, config_class = get_sae_training_class(self.architecture)
            fields = collection.head_target(layer, head, name.target).sae_fields | {"d_sae": d_sae} | sparsity
            d_sae, variant = matched_flat(sae_class(config_class.from_dict(fields)))
        else:
            variant = VARIANTS[name.variant]
        return training_config(
            collection,
            layer,
            head,
            target=name.target,
            loss=name.loss,
            metric=name.metric,
            architecture=self.architecture,
            d_sae=d_sae,
            sae=sparsity | {name: getattr(self, name) for name in ("normalize_activations", "decoder_init")} | variant,
            device=default_device(),
            training_tokens=self.training_tokens,
            train_batch_size_tokens=batch,
            store_batch_size_prompts=max(1, buffered // 4),
            n_batches_in_buffer=buffered,
            n_batches_for_norm_estimate=8,
            lr=self.lr,
            seed=name.seed,
            verbose=False,
        )


def _head(config: RunnerConfig) -> Head:
    from sae_lens_writesae.sae.target import HeadHook

    return HeadHook.parse(config.hook_name)[1:3]


def _shape(config: RunnerConfig) -> str | None:
    """What a dictionary has in common with those that train in the same step; None: it trains alone."""
    from sae_lens_writesae.sae.fast import shape_of

    return shape_of(config) if "hook_write" in config.hook_name else None


def _groups(configs: Mapping[Path, RunnerConfig], collection: Collection) -> list[list[Path]]:
    """Which dictionaries train in one step: those on factors with one shape, as far as the writes of their heads fit
    into memory together. Groups are those of all dictionaries, whether trained yet or not, so that a run which resumes
    trains in the same company, and gives bitwise the same."""
    from sae_lens_writesae.sae.fast import MAX_STACK

    heads = list(dict.fromkeys(map(_head, configs.values())))
    groups: dict[object, list[Path]] = {}
    for folder, config in configs.items():
        size = 4 * collection.n_sequences * collection.context_size * (config.sae.d_k + config.sae.d_v)  # bytes
        stack = heads.index(_head(config)) // max(1, _WRITES_IN_MEMORY // size)
        shape = _shape(config)
        key = folder if shape is None else (shape, stack)
        groups.setdefault(key, []).append(folder)
    stacks = []
    for group in groups.values():
        stacks += [group[start : start + MAX_STACK] for start in range(0, len(group), MAX_STACK)]
    return stacks


def _train(collection: Collection, group: Mapping[Path, RunnerConfig], metrics: Mapping[Head, Metric]) -> None:
    """Dictionaries of one shape, from where a kill left them."""
    from sae_lens_writesae.atom.low_rank import LowRank
    from sae_lens_writesae.sae.fast import train_many_on_writes
    from sae_lens_writesae.sae.runner import train

    configs = list(group.values())
    checkpoint = next(iter(group)) / "checkpoint"  # one of the whole group, in the folder of its first
    of_configs = [metrics[_head(config)] if config.sae.metric != "frobenius" else None for config in configs]
    with quiet():
        if _shape(configs[0]):
            writes = {}
            for head in map(_head, configs):
                keys, values = collection.factors(*head)
                writes[head] = LowRank(keys[:], values[:])
            of_heads = [writes[_head(config)] for config in configs]
            saes = train_many_on_writes(configs, of_heads, of_configs, checkpoint=checkpoint)
        else:
            saes = [train(configs[0], metric=of_configs[0], checkpoint=checkpoint)]
    for folder, sae in zip(group, saes):
        if not (folder / "sae").exists():
            save_dictionary(sae, folder)
