"""What an evaluation is run on: sequences of a text, and an SAE that fits the model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from hookpoints import HookedRecurrent
from sae_lens_writesae.sae.target import check_fits as check_fits


def spread(model: HookedRecurrent, text: str, context_size: int, sequences: int) -> Tensor:
    """[N,context_size] tokens, spread evenly over a text (a text in order of time then gives all times)."""
    ids = model.to_tokens(text, prepend_bos=False, truncate=False)[0]
    n = min(sequences, len(ids) // context_size)
    if n == 0:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one sequence of {context_size}")
    starts = torch.linspace(0, len(ids) - context_size, n).long().tolist()
    return torch.stack([ids[start : start + context_size] for start in starts])


def folder_label(folder: Path) -> str:
    """A name for the SAE in a folder; one called `sae` is named after the folder that it is in."""
    return folder.parent.name if folder.name == "sae" else folder.name
