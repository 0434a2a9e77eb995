"""`writesae collect`: one pass of a model for many heads; and the texts that it and `writesae train` read."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

from datasets import IterableDataset, concatenate_datasets, load_dataset

from hookpoints import HookedRecurrent, embedded
from hookpoints.errors import InputError
from sae_lens_writesae.sae.collecting import check_own, collect
from sae_lens_writesae.sae.target import head_target
from sae_lens_writesae.sae.texts import Text, text_dataset
from writesae.files import check_writable
from writesae.flags import Collect
from writesae.processes import part

Say = Callable[[str], object]

_HUB_NAME = re.compile(r"(?!.*\.(txt|md|csv|jsonl?|parquet|[gx]z|zip)$)([\w-][\w.-]*/)?[\w-][\w.-]*")
"""Of a dataset: no path, and no name that ends as files of text do."""


def run_collect(flags: Collect, say: Say = print) -> Path:
    """Collect; returns the folder."""
    check_writable(flags.out)
    check_text(flags.model, flags.dataset)
    model = HookedRecurrent.from_pretrained(flags.model, dtype=flags.model_dtype, revision=flags.revision)
    return collect_from(flags, model, documents(flags.dataset), say)


def collect_from(
    flags: Collect, model: HookedRecurrent, text: Text, say: Say = print, *, or_fewer: bool = False
) -> Path:
    """Collect from a model that is loaded, as one of the processes that torchrun started; returns the folder."""
    for layer, head in itertools.product(flags.layers, flags.heads):
        head_target(model, layer, head)
    check_own(flags.out)
    collect(
        model,
        text,
        flags.layers,
        flags.heads or None,
        flags.out,
        n_tokens=flags.n_tokens,
        or_fewer=or_fewer,
        context_size=flags.context_size,
        targets=flags.targets,
        dtype=flags.dtype,
        part=part(),
        say=say,
        progress=part()[0] == 0,
    )
    return flags.out


def check_text(model: str, dataset: str | None) -> None:
    """Raise where the model cannot be had or hooked, a file of text is not there, or the text of this package is not
    enough; reads no weights, and asks the hub for no file of this machine."""
    if dataset is not None and not Path(dataset).exists() and not _HUB_NAME.fullmatch(dataset):
        raise InputError(
            f"dataset: expected a text file, a folder of them, or a dataset on the hub (OWNER/NAME), got {dataset!r}: "
            "there is no such file or folder"
        )
    HookedRecurrent.from_pretrained(model, device="meta")
    if dataset is None and model not in embedded.names():
        raise ValueError(
            "dataset: expected a text file, a folder of them, or a dataset with a column `text`, got none; the text of "
            f"the package is enough for {', '.join(embedded.names())} alone, not for {model}"
        )


def documents(dataset: str | None) -> IterableDataset:
    """The texts of a text file, of the `.txt` files of a folder, or of a dataset on the hub or in a folder; None: the
    training text of this package. They are read as they are gone over."""
    if dataset is None:
        return text_dataset(embedded.text("train"))
    place = Path(dataset)
    files = [place] if place.is_file() else sorted(place.glob("*.txt"))
    if files:
        return concatenate_datasets([text_dataset(file) for file in files])
    return load_dataset(dataset, split="train", streaming=True).select_columns("text")
