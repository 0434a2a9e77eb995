"""The texts of a run: documents that are kept for evaluation, and those that follow, to train on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from writesae.dictionaries import enough
from writesae.reproduce.config import ReproduceConfig

if TYPE_CHECKING:
    from datasets import Dataset

    from hookpoints import HookedRecurrent


def write_texts(config: ReproduceConfig, folder: Path, model: HookedRecurrent) -> None:
    """`held-out.txt`, of the first documents, and `train/train.jsonl`, of those that follow; as much as is needed."""
    from sae_lens_writesae.files import atomic_text

    if (folder / "held-out.txt").exists():  # written last
        return
    held_out, train = _texts(config, model)
    atomic_text(folder / "train" / "train.jsonl", "".join(json.dumps({"text": each}) + "\n" for each in train["text"]))
    atomic_text(folder / "held-out.txt", held_out)


def _texts(config: ReproduceConfig, model: HookedRecurrent) -> tuple[str, Dataset]:
    from datasets import load_dataset

    from hookpoints import embedded
    from sae_lens_writesae.sae.runner import text_dataset

    if config.dataset is None:
        documents = iter(text_dataset(embedded.text("train"))["text"])
        return embedded.text("test"), enough(documents, config.training_tokens, model)
    documents = (str(row["text"]) for row in load_dataset(config.dataset, split="train", streaming=True))
    held_out = enough(documents, config.eval_sequences * config.context_size, model)
    return "\n\n".join(held_out["text"]), enough(documents, config.training_tokens, model)
