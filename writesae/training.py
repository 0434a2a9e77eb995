"""`writesae train`: many dictionaries from one pass of a model, in one process or several that share the work.

Each dictionary is in its folder when it is whole, so that the same command resumes where it was stopped or killed.
"""

from __future__ import annotations

import itertools
import logging
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import cast

import pandas as pd
from sae_lens.registry import get_sae_training_class

from hookpoints import HookedRecurrent, HookpointsError, default_device, embedded
from hookpoints.errors import DamageWarning
from hookpoints.files import atomic_folder
from sae_lens_writesae.choices import VARIANTS
from sae_lens_writesae.files import in_turn
from sae_lens_writesae.sae.factors import Collection, CollectionError
from sae_lens_writesae.sae.fast import MAX_STACK, shape_of
from sae_lens_writesae.sae.load import load_sae, model_of
from sae_lens_writesae.sae.metric import Metric
from sae_lens_writesae.sae.metric_fit import fit_metrics
from sae_lens_writesae.sae.runner import train, training_config
from sae_lens_writesae.sae.target import HeadHook, RunnerConfig
from writesae.choices import MATCHED, DictionaryName, Target
from writesae.collecting import Say, check_text, collect_from, documents
from writesae.dictionary.quality import quality_of_heads
from writesae.dictionary.traits import matched_flat, sparsity_fields
from writesae.experiment.tokens import sample_sequences
from writesae.files import check_settings, check_writable, keep_settings, lock_in
from writesae.flags import SIZES, Collect, Train
from writesae.page.template import share_text
from writesae.processes import part

Head = tuple[int, int]
"""Layer and head."""

_WRITES_IN_MEMORY = 4_000_000_000
"""Bytes of the writes that are trained on at once. They are read from disk as they are drawn, again and again; of so
many the system keeps the files in memory."""
_WRITTEN = ("sae", "checkpoint")
"""What the folder of a dictionary has besides its settings."""
FEW_ALIVE = 0.1
"""Share of atoms that fire on held-out text below which a summary warns."""
_METRIC_TOKENS = 32_768
"""Tokens on which a metric is fitted."""


@contextmanager
def quiet() -> Iterator[None]:
    """Silence SAELens' warnings in this scope. It warns that a run with a given model and text cannot be repeated from
    its config alone, which does not concern callers that save their settings."""
    logger = logging.getLogger("sae_lens")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            warnings.simplefilter("default", DamageWarning)
            yield
    finally:
        logger.setLevel(level)


def quality_table(qualities: Mapping[str, object]) -> str:
    """What dictionaries recover on held-out text (fields of `DictionaryQuality` by label) as lines; a dash for None."""
    measured = {label: cast(dict, quality or {}) for label, quality in qualities.items()}
    names = {"explained": "explained variance (1 - error)", "alive": "alive atoms", "recovered": "recovered KL"}
    columns = {name: [share_text(shares.get(field)) for shares in measured.values()] for field, name in names.items()}
    lines = ["on held-out text:", pd.DataFrame(columns, list(measured)).to_string()]
    few = [label for label, shares in measured.items() if shares and shares["alive"] < FEW_ALIVE]
    if few:
        lines.append(
            f"warning: fewer than {FEW_ALIVE:.0%} of atoms fire of {', '.join(few)}; train on more tokens "
            "(--training-tokens), or fewer atoms (--d-sae)"
        )
    return "\n".join(lines)


def run_train(flags: Train, say: Say = print) -> Path:
    """Train what is missing: one group of dictionaries after the other, first those that no other process trains. It
    then waits for the others, and trains those of a process that died.

    Raises:
        ValueError, UnsupportedModelError, UnknownHookError: a head that is not there, a text or a folder that
            cannot be used; before any training.
    """
    check_writable(flags.out)
    sparsity_fields(flags.architecture, flags.k)  # raises where there is no such architecture
    names = (*SIZES, "architecture", "decoder_init", "normalize_activations", "lr")
    settings = {name: getattr(flags, name) for name in names}
    # Other settings are refused before a model runs, where the flags name the heads.
    for layer, head, name in itertools.product(flags.layers, flags.heads, flags.dictionaries()):
        check_settings(flags.out / f"L{layer}H{head}" / str(name), settings, _WRITTEN)
    collection = opened_collection(flags, say)
    layers = flags.layers or tuple(collection.heads)
    heads = flags.heads or tuple(collection.heads[layers[0]])
    # A dictionary belongs to what it was trained on.
    settings |= {"model": collection.model_name, "collection": collection.sha256[:16]}
    configs = {}
    for layer, head, name in itertools.product(layers, heads, flags.dictionaries()):
        folder = flags.out / f"L{layer}H{head}" / str(name)
        check_settings(folder, settings, _WRITTEN)
        configs[folder] = config_of(flags, collection, layer, head, name)
    untrained = [folder for folder in configs if not (folder / "sae").exists()]
    say(f"{len(configs)} dictionaries, {len(configs) - len(untrained)} of them trained already")
    # A group trains whole, its finished dictionaries too: company decides the last bits of each.
    groups = [group for group in trained_together(configs, collection) if not {*untrained}.isdisjoint(group)]
    metrics = fitted_metrics(flags, [configs[folder] for group in groups for folder in group], collection)
    locks = {n: lock_in(group[0]) for n, group in enumerate(groups)}
    for group in map(groups.__getitem__, in_turn(locks, part(), say)):
        missing = [folder for folder in group if not (folder / "sae").exists()]
        for folder in missing:
            keep_settings(folder, settings, _WRITTEN)
        if missing:
            train_group(collection, {folder: configs[folder] for folder in group}, metrics)
            names = ", ".join(str(folder.relative_to(flags.out)) for folder in missing)
            n_trained = sum((folder / "sae").exists() for folder in untrained)
            say(f"{names}  {n_trained} of {len(untrained)}")
    # Of several processes one measures.
    if flags.summary and part()[0] == 0:
        say(summary_table(flags, [folder / "sae" for folder in configs]))
    return flags.out


def summary_table(flags: Train, folders: Sequence[Path]) -> str:
    """What the dictionaries are worth on 8 sequences of 128 tokens of the package's held-out text, as a table. None
    is begun after a minute. A model that cannot be loaded is no error, for the dictionaries are saved."""
    end = time.monotonic() + 60
    saes = {str(each.parent.relative_to(flags.out)): load_sae(each) for each in folders}
    try:
        model = model_of([*saes.values()], dtype=flags.dtype)
    except (OSError, HookpointsError) as error:
        return f"no summary: {error}"
    quality = quality_of_heads(model, saes, sample_sequences(model, embedded.text("test"), 128, 8))
    return quality_table({label: quality(label) if time.monotonic() < end else None for label in saes})


def opened_collection(flags: Train, say: Say) -> Collection:
    """The one that is there, of this model and text where they are named, or the model's, made now.

    Raises:
        CollectionError: it is of other weights, another dtype, another text or other contexts; says of which.
    """
    folder = flags.out / "collection"
    if flags.model is None:
        place = flags.collection or flags.out
        inside = Path(place) / "collection"
        return Collection.open(inside if inside.is_dir() else place)
    with suppress(CollectionError):  # none yet
        name = Collection.open(folder).model_name
        if name not in (flags.model, str(Path(flags.model).resolve())):
            raise ValueError(f"{folder} is of the model {name}, not {flags.model}; name another --out")
    check_text(flags.model, flags.dataset)
    model = HookedRecurrent.from_pretrained(flags.model, dtype=flags.dtype)
    text = documents(flags.dataset)
    try:
        return Collection.open(folder, model=model, text=text, context_size=flags.context_size)
    except CollectionError:  # not finished, or of something else, which `collect` names
        # Dictionaries that are trained for reads need states, whatever they encode.
        names = flags.dictionaries()
        needed: set[Target] = {name.target for name in names}
        needed |= {"state"} if any(name.loss == "reads" for name in names) else set()
        collect_flags = Collect(
            model=flags.model,
            layers=flags.layers,
            heads=flags.heads,
            targets=tuple(sorted(needed)),
            n_tokens=flags.training_tokens,
            context_size=flags.context_size,
            out=folder,
        )
        collect_from(collect_flags, model, text, say, or_fewer=True)
        return Collection.open(folder)


def fitted_metrics(flags: Train, configs: Sequence[RunnerConfig], collection: Collection) -> Mapping[Head, Metric]:
    """The metrics of heads that need one, fitted on the first of the training text; the same each time."""
    heads = {head_of(config) for config in configs if config.sae.metric != "frobenius"}
    if not heads:
        return {}
    n_sequences = max(1, _METRIC_TOKENS // collection.context_size)
    model = HookedRecurrent.from_pretrained(
        collection.model_name, dtype=flags.dtype, revision=collection.origin()["revision"]
    )
    return fit_metrics(model, collection.tokens[:n_sequences], sorted(heads))


def config_of(flags: Train, collection: Collection, layer: int, head: int, name: DictionaryName) -> RunnerConfig:
    """SAELens' config for one dictionary. Raises what `head_target` and the configs raise."""
    batch = flags.train_batch_size_tokens
    d_sae = flags.d_sae
    buffered = max(2, -(-8 * batch // collection.context_size))  # sequences
    sparsity = sparsity_fields(flags.architecture, flags.k)
    if name.variant == MATCHED:
        sae_class, config_class = get_sae_training_class(flags.architecture)
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
        architecture=flags.architecture,
        d_sae=d_sae,
        sae=sparsity | {name: getattr(flags, name) for name in ("normalize_activations", "decoder_init")} | variant,
        device=default_device(),
        training_tokens=flags.training_tokens,
        train_batch_size_tokens=batch,
        store_batch_size_prompts=max(1, buffered // 4),
        n_batches_in_buffer=buffered,
        n_batches_for_norm_estimate=8,
        lr=flags.lr,
        seed=name.seed,
        verbose=False,
    )


def head_of(config: RunnerConfig) -> Head:
    return HeadHook.parse(config.hook_name)[1:3]


def common_shape(config: RunnerConfig) -> str | None:
    """What a dictionary has in common with those that train in the same step; None: it trains alone."""
    return shape_of(config) if "hook_write" in config.hook_name else None


def trained_together(configs: Mapping[Path, RunnerConfig], collection: Collection) -> list[list[Path]]:
    """Which dictionaries train in one step: those on factors with one shape, as far as the writes of their heads fit
    into memory together. Groups are those of all dictionaries, whether trained yet or not, so that a run which resumes
    trains in the same company, and gives bitwise the same."""
    heads = list(dict.fromkeys(map(head_of, configs.values())))
    groups: dict[object, list[Path]] = {}
    for folder, config in configs.items():
        size = 4 * collection.n_sequences * collection.context_size * (config.sae.d_k + config.sae.d_v)  # bytes
        stack = heads.index(head_of(config)) // max(1, _WRITES_IN_MEMORY // size)
        shape = common_shape(config)
        key = folder if shape is None else (shape, stack)
        groups.setdefault(key, []).append(folder)
    stacks = []
    for group in groups.values():
        stacks += [group[start : start + MAX_STACK] for start in range(0, len(group), MAX_STACK)]
    return stacks


def train_group(collection: Collection, group: Mapping[Path, RunnerConfig], metrics: Mapping[Head, Metric]) -> None:
    """Dictionaries of one shape, from where a kill left them."""
    configs = list(group.values())
    checkpoint = next(iter(group)) / "checkpoint"  # one of the whole group, in the folder of its first
    of_configs = [metrics[head_of(config)] if config.sae.metric != "frobenius" else None for config in configs]
    with quiet():
        saes = train(configs, [collection] * len(configs), metric=of_configs, checkpoint=checkpoint)
    for folder, sae in zip(group, saes):
        if not (folder / "sae").exists():  # whole or not at all
            atomic_folder(folder / "sae", lambda aside, sae=sae: sae.save_inference_model(str(aside)), lambda there: ())
