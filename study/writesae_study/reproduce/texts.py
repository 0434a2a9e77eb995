"""The texts of a run: documents that are saved for evaluation, and those that follow, to train on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from writesae.collecting import documents
from writesae_study.reproduce.config import ReproduceConfig

if TYPE_CHECKING:
    from hookpoints import HookedRecurrent


def text_hash(dataset: str | None) -> str | None:
    """Names the text in a file or a folder; None: that of the package, or of the hub. Costs a reading."""
    from hookpoints.files import content_hash, file_hash

    place = Path(dataset or "")
    if dataset is None or not place.exists():
        return None
    files = [place, *sorted(place.rglob("*"))]
    return content_hash([[file.name, file_hash(file)] for file in files if file.is_file()])


def write_texts(config: ReproduceConfig, folder: Path, model: HookedRecurrent) -> None:
    """`held-out.txt`, of the first documents, and `train/train.jsonl`, of those that follow; as much as is needed."""
    from hookpoints import embedded
    from hookpoints.files import atomic_text

    if (folder / "held-out.txt").exists():  # written last
        return
    texts = iter(documents(config.dataset)["text"])
    held_out = embedded.text("test")
    if config.dataset is not None:
        held_out = "\n\n".join(first_texts(texts, config.eval_sequences * config.context_size, model))
    train = first_texts(texts, config.training_tokens, model)
    atomic_text(folder / "train" / "train.jsonl", "".join(json.dumps({"text": each}) + "\n" for each in train))
    atomic_text(folder / "held-out.txt", held_out)


def first_texts(texts: Iterator[str], n_tokens: int, model: HookedRecurrent) -> Iterator[str]:
    """The first texts that have `n_tokens` tokens between them, or all."""
    total = 0
    for text in texts:
        total += model.to_tokens(text, prepend_bos=False, truncate=False).shape[1]
        yield text
        if total >= n_tokens:
            break  # a dataset on the hub is streamed, and may have no end that is worth waiting for
