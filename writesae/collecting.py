"""`writesae collect`: one pass of a model for many heads; and the texts that it and `writesae train` read."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from datasets import Dataset, load_dataset

from hookpoints import HookedRecurrent, embedded
from sae_lens_writesae.sae.collecting import check_own, collect
from sae_lens_writesae.sae.runner import text_dataset
from sae_lens_writesae.sae.target import head_target
from writesae.experiment.tokens import text_of
from writesae.files import check_writable
from writesae.flags import Collect
from writesae.processes import part

Say = Callable[[str], object]


def run_collect(flags: Collect, say: Say = print) -> Path:
    """Collect; returns the folder."""
    check_writable(flags.out)
    check_text(flags.model, flags.dataset)
    model = HookedRecurrent.from_pretrained(flags.model, dtype=flags.model_dtype, revision=flags.revision)
    return collect_from(flags, model, enough(documents(flags.dataset), flags.n_tokens, model), say)


def collect_from(flags: Collect, model: HookedRecurrent, text: Dataset, say: Say = print) -> Path:
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
        context_size=flags.context_size,
        targets=flags.targets,
        dtype=flags.dtype,
        part=part(),
        say=say,
        progress=part()[0] == 0,
    )
    return flags.out


def check_text(model: str, dataset: str | None) -> None:
    """Raise where the model cannot be had or hooked, or the text of this package is not enough; reads no weights."""
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
    place = Path(dataset or "")
    files = [place] if place.is_file() else sorted(place.glob("*.txt")) if dataset else []
    if dataset and not files:
        yield from (str(row["text"]) for row in load_dataset(dataset, split="train", streaming=True))
    for text in map(text_of, files) if dataset else [embedded.text("train")]:
        yield from text_dataset(text)["text"]


def enough(texts: Iterable[str], n_tokens: int | None, model: HookedRecurrent) -> Dataset:
    """The first texts that have `n_tokens` tokens between them, or all."""
    first_texts = []
    total = 0
    for text in texts:
        first_texts.append(text)
        total += model.to_tokens(text, prepend_bos=False, truncate=False).shape[1]
        if n_tokens is not None and total >= n_tokens:
            break  # a dataset on the hub is streamed, and may have no end that is worth waiting for
    return Dataset.from_dict({"text": first_texts})
