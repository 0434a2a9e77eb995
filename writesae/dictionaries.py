"""`writesae collect`: one pass of a model for many heads. `writesae train`: many dictionaries from it, in one process.

Each dictionary is in its folder when it is whole, so that the same command goes on where it was stopped or killed.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import tyro

from writesae.choices import MATCHED, DictionaryName, Dtype, Loss, MetricName, Target, at_least
from writesae.cli import parse
from writesae.files import check_settings, check_writable, keep_settings, taken

if TYPE_CHECKING:
    from datasets import Dataset

    from hookpoints import HookedRecurrent
    from sae_lens_writesae.sae.factors import Collection
    from sae_lens_writesae.sae.metric import Metric
    from sae_lens_writesae.sae.target import RunnerConfig
    from sae_lens_writesae.sae.training import MatrixTrainingSAE

Say = Callable[[str], object]
Place = tuple[int, int, DictionaryName]
"""Layer, head, and which dictionary of that head."""

_SIZES = ("d_sae", "k", "training_tokens", "train_batch_size_tokens")
_WRITES_IN_MEMORY = 4_000_000_000
"""Bytes of the writes that are trained on at once."""
_METRIC_TOKENS = 32_768
"""Tokens on which a metric is fitted."""


@dataclass(frozen=True, kw_only=True)
class Collect:
    """Run a language model over a text once, and write the factors of the heads' recurrences to disk. Any number of
    dictionaries train from them, without the language model (`writesae train --collection OUT`).

    The size is said beforehand. The same command goes on where it was stopped or killed."""

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
    """What dictionaries will be trained on. States need reads, decays and erases beside the writes."""
    context_size: int = 128
    """Tokens per sequence."""
    dataset: str | None = None
    """Dataset on the hub with a column `text`, or a folder of one; by default the held-out text of this package, which
    is enough for the models that ship with it."""
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """Of the stored vectors; auto: the smallest that is safe on a first batch."""
    model_dtype: Dtype = "float32"
    """The model's dtype."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    device: str | None = None
    """Of the model; by default the first GPU, or the CPU."""
    batch_size: int | None = None
    """Sequences of one forward pass; by default 4096 tokens."""

    def __post_init__(self) -> None:
        at_least(self, dict.fromkeys(("n_tokens", "context_size", "batch_size"), 1))

    def run(self, say: Say = print) -> Path:
        """Collect; returns the folder."""
        from datasets import load_dataset

        from hookpoints import HookedRecurrent, embedded
        from sae_lens_writesae.sae.runner import text_dataset

        check_writable(self.out)
        check_text(self.model, self.dataset)
        if self.dataset is None:
            text = text_dataset(embedded.text("train"))
        else:
            text = cast("Dataset", load_dataset(self.dataset, split="train"))
        model = HookedRecurrent.from_pretrained(
            self.model, device=self.device, dtype=self.model_dtype, revision=self.revision
        )
        return self.of(model, text, say)

    def of(self, model: HookedRecurrent, text: Dataset, say: Say = print) -> Path:
        """Collect from a model that is loaded; returns the folder."""
        from sae_lens_writesae.sae.factors import collect
        from sae_lens_writesae.sae.target import head_target

        for layer, head in itertools.product(self.layers, self.heads):
            head_target(model, layer, head)
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
                batch_size=self.batch_size,
                say=say,
            )
        return self.out


def check_text(model: str, dataset: str | None) -> None:
    """Raise where the model cannot be had or hooked, or the text of this package is not enough; reads no weights."""
    from hookpoints import HookedRecurrent, embedded

    HookedRecurrent.from_pretrained(model, device="meta")
    if dataset is None and model not in embedded.names():
        raise ValueError(f"the package's own text is too short for {model}; name a --dataset with a text column")


def enough(documents: Iterable[str], n_tokens: int, model: HookedRecurrent) -> Dataset:
    """The first documents that have `n_tokens` tokens between them, or all."""
    from datasets import Dataset

    kept, total = [], 0
    for document in documents:
        kept.append(document)
        total += model.to_tokens(document, prepend_bos=False, truncate=False).shape[1]
        if total >= n_tokens:
            break
    return Dataset.from_dict({"text": kept})


@contextmanager
def quiet() -> Iterator[None]:
    """Silence SAELens' warnings in this scope. It warns that a run with a given model and text cannot be repeated from
    its config alone, which does not concern callers that keep settings of their own."""
    logger = logging.getLogger("sae_lens")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)


def save_dictionary(sae: MatrixTrainingSAE, folder: Path) -> None:
    """Leave a dictionary in FOLDER/sae, whole or not at all."""
    aside = folder / ".sae"
    shutil.rmtree(aside, ignore_errors=True)
    sae.save_inference_model(str(aside))
    os.replace(aside, folder / "sae")


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train dictionaries on heads of a model: every target, loss, variant and seed of every head that is named.

    Each dictionary is saved in OUT/L{layer}H{head}/{name}/sae, whole or not at all. The same command goes on where it
    was stopped or killed, and trains nothing twice."""

    model: str | None = None
    """Model on the hub, a folder, or one that ships with the package (embedded, embedded-mamba2, embedded-rwkv7). It
    runs once, for all dictionaries."""
    collection: Path | None = None
    """Folder that `writesae collect` wrote, in the place of a model; by default the model's is made in OUT/collection.
    """
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
    writes alone). The latter is fitted to the model, so that it takes --model."""
    names: tuple[str, ...] = ()
    """Dictionaries by name, in the place of targets, losses, variants, seeds and the metric: write-seed0
    state-reads-seed0 write-gauss_newton-seed0."""
    dataset: str | None = None
    """Dataset on the hub with a `text` column, or a folder of one; by default the held-out text of the package, which
    is enough for the models that ship with it."""
    architecture: str = "writesae_topk"
    """Architecture of the dictionaries, as SAELens names it."""
    d_sae: int = 2048
    """Atoms of a dictionary."""
    k: int = 1
    """Active atoms per token; architectures that have no k take no notice of it."""
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

    def __post_init__(self) -> None:
        if (self.model is None) == (self.collection is None):
            raise ValueError("name a model to be run over text, or a collection that it left; one of the two")
        if self.model is not None and not (self.layers and self.heads):
            raise ValueError("name layers and heads of the model")
        for name in ("layers", "heads", "targets", "losses", "variants", "seeds"):
            values = getattr(self, name)
            if len(set(values)) != len(values) or not (values or name in ("layers", "heads")):
                raise ValueError(f"{name} name one or more, once each; found {list(values)}")
        at_least(self, dict.fromkeys((*_SIZES, "context_size"), 1) | {"seeds": 0})
        for each in self.dictionaries():
            if each.metric != "frobenius" and not (self.model is not None and each.on_factors):
                raise ValueError(f"the metric {each.metric} is one of a model's writes: give --model, found {each}")

    @classmethod
    def from_arguments(cls, arguments: Sequence[str]) -> Train:
        """The command line as a value; flags of SAELens are told where they belong."""
        if any(word.startswith(("--hook_name", "--model_class_name", "--dataset_path")) for word in arguments):
            raise ValueError(
                "these are the flags of SAELens' own runner: call it from Python, after `import sae_lens_writesae`"
            )
        return parse(cls, "writesae train", arguments)

    def dictionaries(self) -> list[DictionaryName]:
        """What is trained on each head."""
        if self.names:
            return [DictionaryName.parse(name) for name in self.names]
        every = itertools.product(self.targets, self.losses, self.variants, self.seeds)
        return [DictionaryName.parse(str(DictionaryName(*each, metric=self.metric))) for each in every]

    def run(self, say: Say = print) -> Path:
        """Train what is missing.

        Raises:
            ValueError, UnsupportedModelError, UnknownHookError: a head that is not there, a text or a folder that
                cannot be used; before any training.
        """
        check_writable(self.out)
        from writesae.experiment.traits import sparsity_fields

        sparsity_fields(self.architecture, self.k)  # raises where there is no such architecture
        collection = self._collection(say)
        layers = self.layers or tuple(collection.heads)
        heads = self.heads or tuple(collection.heads[layers[0]])
        places = [(*place, name) for place in itertools.product(layers, heads) for name in self.dictionaries()]
        folders = {place: self.out / f"L{place[0]}H{place[1]}" / str(place[2]) for place in places}
        names = (*_SIZES, "architecture", "normalize_activations", "lr")
        settings = {name: getattr(self, name) for name in names} | {"model": collection.model_name}
        for folder in folders.values():
            check_settings(folder, settings)
        configs = {place: self.training_config(collection, *place) for place in places}
        left = [place for place in places if not (folders[place] / "sae").exists()]
        say(f"{len(places)} dictionaries, {len(places) - len(left)} of them trained already")
        groups = [group for group in self._groups(places, configs, collection) if not {*left}.isdisjoint(group)]
        measured = [place[:2] for group in groups for place in group if place[2].metric != "frobenius"]
        metrics = self._metrics(measured, collection)
        begin = time.monotonic()
        done = 0
        for group in groups:
            with ExitStack() as locks:
                for folder in sorted(folders[place] for place in group):
                    locks.enter_context(taken(folder, say))
                missing = [place for place in group if not (folders[place] / "sae").exists()]
                for place in missing:
                    keep_settings(folders[place], settings)
                if missing:
                    self._train(collection, group, configs, folders, metrics)
                done += len(missing)
            if missing:
                rest = (time.monotonic() - begin) / done * (len(left) - done)
                names = ", ".join(str(folders[place].relative_to(self.out)) for place in missing)
                say(f"{names}  {done} of {len(left)}, about {rest:.0f} s left")
        return self.out

    def _collection(self, say: Say) -> Collection:
        """The one that is there, or the model's, made now."""
        from sae_lens_writesae.sae.factors import Collection, CollectionError

        if self.collection is not None:
            return Collection.open(self.collection)
        folder = self.out / "collection"
        try:
            there = Collection.open(folder)
        except CollectionError:  # not there, or not finished
            return self._collect(folder, say)
        if there.model_name != self.model:
            raise ValueError(f"{folder} is of the model {there.model_name}, not {self.model}; name another --out")
        return there

    def _collect(self, folder: Path, say: Say) -> Collection:
        from sae_lens_writesae.sae.factors import Collection

        name = cast(str, self.model)
        check_text(name, self.dataset)
        model, text = self._model_and_text(self.training_tokens)
        needed: set[Target] = {each.target for each in self.dictionaries()}
        needed |= {"state"} if any(each.loss == "reads" for each in self.dictionaries()) else set()
        collect = Collect(
            model=name,
            layers=self.layers,
            heads=self.heads,
            targets=tuple(sorted(needed)),
            context_size=self.context_size,
            out=folder,
        )
        collect.of(model, text, say)
        return Collection.open(folder)

    def _model_and_text(self, n_tokens: int) -> tuple[HookedRecurrent, Dataset]:
        """The model, and documents of the training text that have so many tokens between them."""
        from datasets import load_dataset

        from hookpoints import HookedRecurrent, embedded
        from sae_lens_writesae.sae.runner import text_dataset

        model = HookedRecurrent.from_pretrained(cast(str, self.model), dtype=self.dtype)
        if self.dataset is None:
            documents = text_dataset(embedded.text("train"))["text"]
        else:
            documents = (str(row["text"]) for row in load_dataset(self.dataset, split="train", streaming=True))
        return model, enough(documents, n_tokens, model)

    def _metrics(self, heads: Sequence[tuple[int, int]], collection: Collection) -> dict[tuple[int, int], Metric]:
        """The metrics of some heads, fitted on the first of the training text; the same each time."""
        from sae_lens_writesae.sae.metric_fit import fit_metrics
        from writesae.experiment.tokens import sample_sequences

        if not heads:
            return {}
        model, text = self._model_and_text(_METRIC_TOKENS)
        size = min(collection.context_size, _METRIC_TOKENS)
        tokens = sample_sequences(model, "\n".join(text["text"]), size, _METRIC_TOKENS // size)
        return fit_metrics(model, tokens, sorted(set(heads)))

    def _groups(
        self, places: Sequence[Place], configs: Mapping[Place, RunnerConfig], collection: Collection
    ) -> list[list[Place]]:
        """Which dictionaries train in one step: those on factors with one shape, as far as the writes of their heads
        fit into memory together. Groups are those of all dictionaries, whether trained yet or not, so that a run which
        goes on trains in the same company, and gives bitwise the same."""
        from sae_lens_writesae.sae.fast import MAX_STACK, shape_of

        groups: list[list[Place]] = []
        open_groups: dict[object, list[Place]] = {}
        n_writes = collection.n_sequences * collection.context_size
        for place in places:
            shape = shape_of(configs[place]) if place[2].target == "write" else None
            group = open_groups.get(shape) if shape is not None else None
            sae = configs[place].sae
            heads = max(1, _WRITES_IN_MEMORY // (4 * n_writes * (sae.d_k + sae.d_v)))
            if group is None or len(group) == MAX_STACK or len({each[:2] for each in (*group, place)}) > heads:
                group = []
                groups.append(group)
                open_groups |= {shape: group} if shape is not None else {}
            group.append(place)
        return groups

    def _train(
        self,
        collection: Collection,
        group: Sequence[Place],
        configs: Mapping[Place, RunnerConfig],
        folders: Mapping[Place, Path],
        metrics: Mapping[tuple[int, int], Metric],
    ) -> None:
        """Dictionaries of one shape, from where a kill left them."""
        from sae_lens_writesae.atom.low_rank import LowRank
        from sae_lens_writesae.sae.fast import shape_of, train_many_on_writes
        from sae_lens_writesae.sae.runner import train

        checkpoint = folders[group[0]] / "checkpoint"
        with quiet():
            if group[0][2].target == "write" and shape_of(configs[group[0]]) is not None:
                heads = {place[:2]: collection.factors(*place[:2]) for place in group}
                writes = {head: LowRank(mapped.keys[:], mapped.values[:]) for head, mapped in heads.items()}
                wanted = [metrics.get(place[:2]) if place[2].metric != "frobenius" else None for place in group]
                every = [configs[place] for place in group], [writes[place[:2]] for place in group], wanted
                saes = train_many_on_writes(*every, checkpoint=checkpoint)
            else:
                (place,) = group
                metric = metrics.get(place[:2]) if place[2].metric != "frobenius" else None
                saes = [train(configs[place], metric=metric, checkpoint=checkpoint)]
        for place, sae in zip(group, saes):
            if not (folders[place] / "sae").exists():
                save_dictionary(sae, folders[place])

    def training_config(self, collection: Collection, layer: int, head: int, name: DictionaryName) -> RunnerConfig:
        """SAELens' config for one dictionary. Raises what `head_target` and the configs raise."""
        import torch

        from sae_lens_writesae.sae.runner import training_config

        batch = self.train_batch_size_tokens
        buffered = max(2, -(-8 * batch // collection.context_size))  # sequences
        d_sae, sae = self._size(collection, layer, head, name)
        return training_config(
            collection,
            layer,
            head,
            target=name.target,
            loss=name.loss,
            metric=name.metric,
            architecture=self.architecture,
            d_sae=d_sae,
            sae=sae,
            device="cuda" if torch.cuda.is_available() else "cpu",
            training_tokens=self.training_tokens,
            train_batch_size_tokens=batch,
            store_batch_size_prompts=max(1, buffered // 4),
            n_batches_in_buffer=buffered,
            n_batches_for_norm_estimate=8,
            lr=self.lr,
            seed=name.seed,
            verbose=False,
        )

    def _size(
        self, collection: Collection, layer: int, head: int, name: DictionaryName
    ) -> tuple[int, dict[str, object]]:
        """d_sae, and further fields of a dictionary's SAE."""
        from sae_lens.registry import get_sae_training_class

        from sae_lens_writesae.choices import VARIANTS
        from writesae.experiment.traits import matched_flat, sparsity_fields

        sae_class, config_class = get_sae_training_class(self.architecture)
        sparsity = sparsity_fields(self.architecture, self.k)
        given = sparsity | {"normalize_activations": self.normalize_activations}
        if name.variant != MATCHED:
            return self.d_sae, given | VARIANTS[name.variant]
        place = collection.head_target(layer, head, name.target)
        size, fields = matched_flat(
            sae_class(config_class.from_dict(place.sae_fields | {"d_sae": self.d_sae} | sparsity))
        )
        return size, given | fields
