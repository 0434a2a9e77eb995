"""What the steps of a run work with: the model, the text, the folder. Loaded when first needed."""

from __future__ import annotations

import copy
import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import fields
from functools import cached_property
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from sae_lens import SAE, LanguageModelSAERunnerConfig, TrainingSAE
from sae_lens.constants import RUNNER_CFG_FILENAME
from sae_lens.registry import get_sae_training_class
from torch import Tensor

from hookpoints import HookedRecurrent, embedded
from sae_lens_writesae.errors import NothingToMeasureError
from sae_lens_writesae.evaluations import EVALUATIONS, load_result
from sae_lens_writesae.experiment.evaluation import Evaluation
from sae_lens_writesae.experiment.result import Json
from sae_lens_writesae.experiment.tokens import sample_sequences
from sae_lens_writesae.files import atomic_text
from sae_lens_writesae.page.atoms.collect import AtomPages
from sae_lens_writesae.page.atoms.pages import write_atom_pages
from sae_lens_writesae.page.report import find_results, write_report
from sae_lens_writesae.reproduce.config import MATCHED, Dictionary, ReproduceConfig
from sae_lens_writesae.sae.base import VARIANTS
from sae_lens_writesae.sae.checkpoint import ASIDE_PREFIX
from sae_lens_writesae.sae.kinds import matched_flat
from sae_lens_writesae.sae.load import load_sae
from sae_lens_writesae.sae.runner import Trainer as SaeLensTrainer
from sae_lens_writesae.sae.runner import WriteSAETrainingRunner, quiet, text_dataset, training_config
from sae_lens_writesae.sae.target import RunnerConfig, head_target

Trainer = Callable[[RunnerConfig, HookedRecurrent, Dataset], TrainingSAE]
"""Trains one dictionary from a runner's config on a model and a text. Where its inputs are normalised, the factor is
folded into the weights, as SAELens' runner does it."""

_CHECKPOINTS = 20
"""Checkpoints in a training run: what is lost when it is killed without warning is at most a twentieth of it."""

_CHARACTERS_PER_TOKEN = 6
"""More than any text has, so that enough documents are kept back for evaluation."""


class Workspace:
    """A run's folder, and what its steps share.

    Args:
        config: of the run.
        folder: where the run keeps everything.
        device: of this process; None: the first GPU, or the CPU.
        trainer: trains one dictionary; by default SAELens' runner, whose newest two checkpoints are kept.
    """

    def __init__(
        self, config: ReproduceConfig, folder: Path, device: str | None = None, trainer: Trainer | None = None
    ):
        self.config, self.folder = config, folder
        self.trainer = trainer or train_frugally
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")

    def at(self, config: ReproduceConfig, folder: Path) -> Workspace:
        """The same model and text for dictionaries of other settings, in another folder. Only what dictionaries are
        made of may differ (k, d_sae, architecture, seeds, learning rate ...)."""
        other = copy.copy(self)
        other.config, other.folder = config, folder
        return other

    def check(self) -> None:
        """Raise ValueError (or UnsupportedModelError, UnknownHookError) unless the run can be done at all."""
        if self.config.dataset is None and self.config.model not in embedded.names():
            raise ValueError(
                f"the package's own text is too short for {self.config.model}; name a dataset with a text column"
            )
        for layer, head in itertools.product(self.config.layers, self.config.heads):
            head_target(self.model, layer, head)

    @cached_property
    def model(self) -> HookedRecurrent:
        """The hooked model, on this process's device."""
        dtype = getattr(torch, self.config.dtype)
        return HookedRecurrent.from_pretrained(self.config.model, device=self.device, dtype=dtype)

    @cached_property
    def _documents(self) -> list[str]:
        """The first documents of the dataset, which are kept for evaluation."""
        needed = self.config.eval_sequences * self.config.context_size * _CHARACTERS_PER_TOKEN
        kept, total = [], 0
        for row in load_dataset(self.config.dataset, split="train", streaming=True):  # type: ignore[arg-type]
            kept.append(row["text"])
            total += len(kept[-1])
            if total >= needed:
                break
        return kept

    @cached_property
    def tokens(self) -> Tensor:
        """[N,T] evaluation sequences; no dictionary is trained on this text."""
        text = embedded.text("test") if self.config.dataset is None else "\n\n".join(self._documents)
        return sample_sequences(self.model, text, self.config.context_size, self.config.eval_sequences).to(self.device)

    @cached_property
    def dataset(self) -> Dataset:
        """Training text: what comes after the documents kept for evaluation."""
        if self.config.dataset is None:
            return text_dataset(embedded.text("train"))
        stream = load_dataset(self.config.dataset, split="train", streaming=True)
        rest = itertools.islice(stream, len(self._documents), None)
        budget = self.config.training_tokens * _CHARACTERS_PER_TOKEN
        documents, total = [], 0
        for row in rest:
            documents.append(row["text"])
            total += len(documents[-1])
            if total >= budget:
                break
        return Dataset.from_dict({"text": documents})

    def sae(self, dictionary: Dictionary) -> SAE:
        """A trained dictionary of this run."""
        return load_sae(self.folder / dictionary.key / "sae", device=self.device)

    # -- steps

    def train(self, dictionary: Dictionary) -> None:
        """Train one dictionary; goes on from its newest whole checkpoint, if there is one."""
        own = self.folder / dictionary.key
        checkpoints = own / "checkpoints"
        cfg = self.training_config(dictionary, checkpoints)
        whole = whole_checkpoints(checkpoints)
        cfg.resume_from_checkpoint = str(whole[-1]) if whole else None
        with quiet():
            sae = self.trainer(cfg, self.model, self.dataset)
        aside = own / ".sae"
        shutil.rmtree(aside, ignore_errors=True)
        sae.save_inference_model(str(aside))
        os.replace(aside, own / "sae")
        shutil.rmtree(checkpoints, ignore_errors=True)

    def training_config(self, dictionary: Dictionary, checkpoints: Path) -> LanguageModelSAERunnerConfig:
        """SAELens' config for one dictionary."""
        c = self.config
        batch = c.train_batch_size_tokens
        buffered = max(2, -(-8 * batch // c.context_size))  # sequences
        d_sae, fields = self._size(dictionary)
        return training_config(
            self.model,
            dictionary.layer,
            dictionary.head,
            target=dictionary.target,
            loss=dictionary.loss,
            architecture=c.architecture,
            d_sae=d_sae,
            sae=fields,
            training_tokens=c.training_tokens,
            context_size=c.context_size,
            train_batch_size_tokens=batch,
            store_batch_size_prompts=max(1, buffered // 4),
            n_batches_in_buffer=buffered,
            n_batches_for_norm_estimate=8,
            lr=c.lr,
            lr_scheduler_name="cosineannealing",
            lr_warm_up_steps=50,
            dead_feature_window=100,
            seed=dictionary.seed,
            verbose=False,
            n_checkpoints=_CHECKPOINTS,
            checkpoint_path=str(checkpoints),
        )

    def _size(self, dictionary: Dictionary) -> tuple[int, dict[str, object]]:
        """d_sae, and further fields of a dictionary's SAE."""
        c = self.config
        sae_class, config_class = get_sae_training_class(c.architecture)
        # Architectures with a penalty in the place of a number of active atoms have no k.
        sparsity: dict[str, object] = {"k": c.k} if "k" in {f.name for f in fields(config_class)} else {}
        given = sparsity | {"normalize_activations": "expected_average_only_in"}
        if dictionary.variant != MATCHED:
            return c.d_sae, given | VARIANTS.get(dictionary.variant, {})
        place = head_target(self.model, dictionary.layer, dictionary.head, dictionary.target)
        flat = matched_flat(sae_class(config_class.from_dict(place.sae_fields | {"d_sae": c.d_sae} | sparsity)))
        return flat.d_sae, given | flat.fields

    def evaluate(self, kind: str, key: str, dictionaries: list[Dictionary]) -> None:
        """One evaluation of a dictionary, of a head or of several dictionaries, saved to the folder `key`; where there
        is nothing to measure, the result says why."""
        first, several_heads = dictionaries[0], len({dictionary.cell for dictionary in dictionaries}) > 1
        saes = {(each.key if several_heads else each.label): self.sae(each) for each in dictionaries}
        place = key.rpartition("/")[0]  # a head, or a layer
        label = f"{first.cell} {first.target}-trained" if key.startswith(first.key) else place
        self.evaluation(kind, label).run_or_skip(self.model, saes, self.tokens).save(self.folder / key)

    def evaluation(self, kind: str, label: str) -> Evaluation:
        """An evaluation with the run's sizes, where it has such settings, then what the run's settings say."""
        c = self.config
        sizes: dict[str, Json] = {"n_atoms": c.n_atoms, "firings_per_atom": c.firings_per_atom}
        sizes |= {"seed": c.seeds[0], "label": label}
        known = {f.name for f in fields(EVALUATIONS[kind])}
        settings = {name: value for name, value in sizes.items() if name in known}
        return EVALUATIONS[kind].from_dict(settings | c.settings.get(kind, {}))

    def show(self, dictionary: Dictionary) -> None:
        """Pages of a dictionary's atoms, drawn from those that its substitution test looked at, if there is one; in a
        folder that is renamed into place. Where no atom can be shown, the reason is in the folder."""
        of_dictionary = self.folder / dictionary.key
        pages = AtomPages(
            n_atoms=self.config.dashboards,
            seed=self.config.seeds[0],
            label=f"{dictionary.cell} {dictionary.target}-trained",
        )
        tested = load_result(of_dictionary / "substitution") if (of_dictionary / "substitution").exists() else None
        aside = of_dictionary / ".atoms"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            data = pages.collect(self.model, self.sae(dictionary), self.tokens, substitution=tested)
            write_atom_pages(data, aside)
        except NothingToMeasureError as error:
            atomic_text(aside / "nothing-to-show.txt", f"{error}\n")
        os.replace(aside, of_dictionary / "atoms")

    def report(self) -> None:
        """The page over all that was computed, in a folder that is renamed into place."""
        aside = self.folder / ".report"
        shutil.rmtree(aside, ignore_errors=True)
        write_report(find_results([self.folder]), aside / "report.html")
        os.replace(aside, self.folder / "report")


def train_frugally(cfg: RunnerConfig, model: HookedRecurrent, dataset: Dataset) -> TrainingSAE:
    """SAELens' runner, with few checkpoints."""
    return _FrugalRunner(cfg, override_model=model, override_dataset=dataset).run()


class _FrugalRunner(WriteSAETrainingRunner):
    """Keeps the newest two checkpoints; for a wide SAE each is gigabytes."""

    def save_whole_checkpoint(
        self, trainer: SaeLensTrainer, checkpoint_name: str | None = None, wandb_aliases: list[str] | None = None
    ) -> Path:
        saved = super().save_whole_checkpoint(trainer, checkpoint_name, wandb_aliases)
        for old in whole_checkpoints(saved.parent.parent)[:-2]:
            shutil.rmtree(old)
        return saved


def whole_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints below `folder` by samples seen. What a kill left aside is passed over, and so is one whose last file
    is not whole."""
    found = []
    for file in folder.rglob(RUNNER_CFG_FILENAME):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError:
            continue
        if not file.parent.parent.name.startswith(ASIDE_PREFIX):
            found.append(file.parent)
    return sorted(found, key=lambda path: int(path.name.rpartition("_")[2]))
