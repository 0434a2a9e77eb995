"""The texts of a run: documents that are kept for evaluation, and those that follow, to train on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from writesae.dictionaries import enough
from writesae.reproduce.config import ReproduceConfig

if TYPE_CHECKING:
    from hookpoints import HookedRecurrent


def write_texts(config: ReproduceConfig, folder: Path, model: HookedRecurrent) -> None:
    """`held-out.txt`, of the first documents, and `train/train.jsonl`, of those that follow; as much as is needed."""
    from datasets import load_dataset

    from hookpoints import embedded
    from sae_lens_writesae.files import atomic_text
    from sae_lens_writesae.sae.runner import text_dataset

    if (folder / "held-out.txt").exists():  # written last
        return
    if config.dataset is None:
        held_out, documents = embedded.text("test"), iter(text_dataset(embedded.text("train"))["text"])
    else:
        documents = (str(row["text"]) for row in load_dataset(config.dataset, split="train", streaming=True))
        first = enough(documents, config.eval_sequences * config.context_size, model)
        held_out = "\n\n".join(first["text"])
    train = enough(documents, config.training_tokens, model)["text"]
    atomic_text(folder / "train" / "train.jsonl", "".join(json.dumps({"text": each}) + "\n" for each in train))
    atomic_text(folder / "held-out.txt", held_out)
