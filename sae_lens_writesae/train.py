"""`writesae train`: many dictionaries of many heads in one process; each is in its folder when it is whole."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import tyro

from sae_lens_writesae.choices import VARIANTS, Loss, Target
from sae_lens_writesae.cli import parse
from sae_lens_writesae.files import check_writable, taken

if TYPE_CHECKING:
    from hookpoints import HookedRecurrent
    from sae_lens_writesae.sae.target import RunnerConfig

MATCHED = "FlatSAE-matched"
"""A flat SAE with as many parameters as the WriteSAE has."""

_CHECKPOINTS = 20
"""Checkpoints in a training run: what is lost when it is killed without warning is at most a twentieth of it."""


@dataclass(frozen=True)
class DictionaryName:
    """What a dictionary is, as its folder says it: `write-seed0`, `state-reads-seed0`, `write-FlatSAE-seed2`."""

    target: Target
    loss: Loss = "mse"
    variant: str = "WriteSAE"
    """Of `VARIANTS`, or `MATCHED`."""
    seed: int = 0

    def __str__(self) -> str:
        loss = "" if self.loss == "mse" else self.loss
        variant = "" if self.variant == "WriteSAE" else self.variant
        return "-".join([self.target, *filter(None, [loss, variant]), f"seed{self.seed}"])

    @classmethod
    def parse(cls, name: str) -> DictionaryName:
        """From its folder's name; ValueError, with what there is, where it is none."""
        targets, losses, variants = get_args(Target), get_args(Loss), (*VARIANTS, MATCHED)
        match = re.fullmatch(
            f"({'|'.join(targets)})(?:-({'|'.join(losses)}))?(?:-({'|'.join(variants)}))?-seed([0-9]+)", name
        )
        if match is None:
            raise ValueError(
                f"{name!r} names no dictionary; names are TARGET[-LOSS][-VARIANT]-seedN, with targets "
                f"{', '.join(targets)}, losses {', '.join(losses)} and variants {', '.join(variants)}"
            )
        return cls(cast(Target, match[1]), cast(Loss, match[2] or "mse"), match[3] or "WriteSAE", int(match[4]))


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train dictionaries on heads of a model: every target, loss, variant and seed of every head that is named.

    Each dictionary is saved in OUT/L{layer}H{head}/{name}/sae, whole or not at all. The same command goes on where it
    was stopped or killed, and trains nothing twice. SAELens' own flags are those of `writesae train-saelens`."""

    model: str
    """Model on the hub, a folder, or one that ships with the package (embedded, embedded-mamba2, embedded-rwkv7)."""
    layers: Annotated[tuple[int, ...], tyro.conf.arg(aliases=("--layer",))]
    """Recurrent layers."""
    heads: Annotated[tuple[int, ...], tyro.conf.arg(aliases=("--head",))]
    """Heads of every layer."""
    targets: Annotated[tuple[Target, ...], tyro.conf.arg(aliases=("--target",))] = ("write",)
    """What dictionaries are trained on."""
    losses: Annotated[tuple[Loss, ...], tyro.conf.arg(aliases=("--loss",))] = ("mse",)
    """What they are trained for."""
    variants: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--variant",))] = ("WriteSAE",)
    """How they are built: of `sae_lens_writesae.VARIANTS`, or FlatSAE-matched, a flat SAE with as many parameters as
    the WriteSAE has."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(aliases=("--seed",))] = (0,)
    """Seeds of weights and data order."""
    names: tuple[str, ...] = ()
    """Dictionaries by name, in the place of targets, losses, variants and seeds: write-seed0 state-reads-seed0."""
    dataset: str | None = None
    """Dataset on the hub with a `text` column, or a folder of one; by default the held-out text of the package, which
    is enough for the models that ship with it."""
    architecture: str = "writesae_batchtopk"
    """Architecture of the dictionaries, as SAELens names it."""
    d_sae: int = 2048
    """Atoms of a dictionary."""
    k: int = 32
    """Active atoms per token."""
    training_tokens: int = 5_000_000
    """Tokens that each dictionary is trained on."""
    train_batch_size_tokens: int = 4096
    """Rows of an optimizer step."""
    lr: float = 3e-4
    """Learning rate of Adam."""
    context_size: int = 1024
    """Tokens per sequence."""
    dtype: str = "float32"
    """The model's dtype."""
    out: Path = Path("writesae-out/saes")
    """Folder of the dictionaries."""

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "targets", "losses", "variants", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name} name one or more, once each; found {list(values)}")
        for name in ("d_sae", "k", "training_tokens", "train_batch_size_tokens", "context_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        self.dictionaries()

    @classmethod
    def from_arguments(cls, arguments: Sequence[str]) -> Train:
        """The command line as a value; flags of SAELens are told where they belong."""
        if any(word.startswith(("--hook_name", "--model_class_name", "--dataset_path")) for word in arguments):
            raise ValueError("these are SAELens' own flags, which `writesae train-saelens` takes")
        return parse(cls, "writesae train", arguments)

    def dictionaries(self) -> list[DictionaryName]:
        """What is trained on each head."""
        if self.names:
            return [DictionaryName.parse(name) for name in self.names]
        every = itertools.product(self.targets, self.losses, self.variants, self.seeds)
        return [DictionaryName.parse(str(DictionaryName(*each))) for each in every]

    def run(self, say: Callable[[str], object] = print) -> Path:
        """Train what is missing.

        Raises:
            ValueError, UnsupportedModelError, UnknownHookError: a head that is not there, a dataset or a folder that
                cannot be used; before any training.
        """
        from hookpoints import HookedRecurrent

        folders = [
            (self.out / f"L{layer}H{head}" / str(name), layer, head, name)
            for layer, head in itertools.product(self.layers, self.heads)
            for name in self.dictionaries()
        ]
        check_writable(self.out)
        left = [each for each in folders if not (each[0] / "sae").exists()]
        say(f"{len(folders)} dictionaries, {len(folders) - len(left)} of them trained already")
        if not left:
            return self.out
        model = HookedRecurrent.from_pretrained(self.model, dtype=self.dtype)
        configs = [self.training_config(model, layer, head, name, folder) for folder, layer, head, name in left]
        begin = time.monotonic()
        for done, ((folder, *_), cfg) in enumerate(zip(left, configs), 1):
            with taken(folder, say):
                if not (folder / "sae").exists():
                    self._train(model, cfg, folder)
            each = (time.monotonic() - begin) / done
            say(f"{folder.relative_to(self.out)}  {done}/{len(left)}, about {each * (len(left) - done):.0f} s left")
        return self.out

    def _train(self, model: HookedRecurrent, cfg: RunnerConfig, folder: Path) -> None:
        """One dictionary; goes on from its newest whole checkpoint, if there is one."""
        from hookpoints import embedded
        from sae_lens_writesae.sae.runner import FrugalRunner, quiet, text_dataset, whole_checkpoints

        whole = whole_checkpoints(folder / "checkpoints")
        cfg.resume_from_checkpoint = str(whole[-1]) if whole else None
        dataset = text_dataset(embedded.text("train")) if self.dataset is None else None
        with quiet():
            sae = FrugalRunner(cfg, override_model=model, override_dataset=dataset).run()
        aside = folder / ".sae"
        shutil.rmtree(aside, ignore_errors=True)
        sae.save_inference_model(str(aside))
        os.replace(aside, folder / "sae")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    def training_config(
        self, model: HookedRecurrent, layer: int, head: int, name: DictionaryName, folder: Path
    ) -> RunnerConfig:
        """SAELens' config for one dictionary. Raises what `head_target` and the configs raise."""
        from hookpoints import embedded
        from sae_lens_writesae.sae.runner import training_config

        if self.dataset is None and self.model not in embedded.names():
            raise ValueError(f"the package's own text is too short for {self.model}; name a dataset with a text column")
        batch = self.train_batch_size_tokens
        buffered = max(2, -(-8 * batch // self.context_size))  # sequences
        d_sae, fields = self._size(model, layer, head, name)
        text = {} if self.dataset is None else {"dataset_path": self.dataset, "streaming": True}
        return training_config(
            model,
            layer,
            head,
            target=name.target,
            loss=name.loss,
            architecture=self.architecture,
            d_sae=d_sae,
            sae=fields,
            training_tokens=self.training_tokens,
            context_size=self.context_size,
            train_batch_size_tokens=batch,
            store_batch_size_prompts=max(1, buffered // 4),
            n_batches_in_buffer=buffered,
            n_batches_for_norm_estimate=8,
            lr=self.lr,
            lr_scheduler_name="cosineannealing",
            lr_warm_up_steps=50,
            dead_feature_window=100,
            seed=name.seed,
            verbose=False,
            n_checkpoints=_CHECKPOINTS,
            checkpoint_path=str(folder / "checkpoints"),
            **text,
        )

    def _size(
        self, model: HookedRecurrent, layer: int, head: int, name: DictionaryName
    ) -> tuple[int, dict[str, object]]:
        """d_sae, and further fields of a dictionary's SAE."""
        from sae_lens.registry import get_sae_training_class

        from sae_lens_writesae.sae.kinds import matched_flat
        from sae_lens_writesae.sae.target import head_target

        fields: dict[str, object] = {"k": self.k, "normalize_activations": "expected_average_only_in"}
        if name.variant != MATCHED:
            return self.d_sae, fields | VARIANTS[name.variant]
        sae_class, config_class = get_sae_training_class(self.architecture)
        place = head_target(model, layer, head, name.target)
        flat = matched_flat(sae_class(config_class.from_dict(place.sae_fields | {"d_sae": self.d_sae, "k": self.k})))
        return flat.d_sae, fields | flat.fields
