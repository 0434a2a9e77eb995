"""The texts of a run: documents that are saved for evaluation, and those that follow, to train on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from writesae.collecting import documents, enough
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
    texts, held_out = documents(config.dataset), embedded.text("test")
    if config.dataset is not None:
        held_out = "\n\n".join(enough(texts, config.eval_sequences * config.context_size, model)["text"])
    train = enough(texts, config.training_tokens, model)["text"]
    atomic_text(folder / "train" / "train.jsonl", "".join(json.dumps({"text": each}) + "\n" for each in train))
    atomic_text(folder / "held-out.txt", held_out)
