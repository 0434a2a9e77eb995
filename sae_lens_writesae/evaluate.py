"""What an evaluation is run on: sequences of a text, and an SAE that fits the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hookpoints import HookedRecurrent


def spread(model: HookedRecurrent, text: str, context_size: int, sequences: int) -> Tensor:
    """[N,context_size] tokens, spread evenly over a text (a text in order of time then gives all times)."""
    ids = model.to_tokens(text, prepend_bos=False, truncate=False)[0]
    n = min(sequences, len(ids) // context_size)
    if n == 0:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one sequence of {context_size}")
    starts = torch.linspace(0, len(ids) - context_size, n).long().tolist()
    return torch.stack([ids[start : start + context_size] for start in starts])


def check_fits(model: HookedRecurrent, sae: Any, where: Path | str) -> None:
    """Raise ValueError unless the SAE's hook exists on the model with the SAE's sizes; names both."""
    from hookpoints.hooks.guard import check_names
    from sae_lens_writesae.firings import HeadHook

    hook = HeadHook.of(sae)
    check_names(model, str(sae.cfg.metadata.hook_name))
    shape = model.cfg.layer(hook.layer)
    if sae.cfg.d_in != shape.K * shape.V:
        raise ValueError(
            f"the SAE in {where} reads {sae.cfg.d_in} numbers, but {sae.cfg.metadata.hook_name} of "
            f"{model.cfg.model_name} has {shape.K} x {shape.V} = {shape.K * shape.V}"
        )


def folder_label(folder: Path) -> str:
    """A name for the SAE in a folder; one called `sae` is named after the folder that it is in."""
    return folder.parent.name if folder.name == "sae" else folder.name
