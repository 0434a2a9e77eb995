"""Checkpoints in the first version of flash-linear-attention's format, such as RWKV/RWKV7-Goose-World3-1.5B-HF.

They hold the six token shifts of a layer as one tensor ``attn.x_x`` [6,D]. transformers loads parameters by their names
alone, so these are taken apart before it sees them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_JOINED = ".attn.x_x"
_PARTS = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")
_WHERE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
"""Arguments of ``from_pretrained`` that say where a checkpoint is."""


def legacy_weights(name_or_path: str, options: dict[str, Any]) -> dict[str, Tensor] | None:
    """All weights of a checkpoint under their present names, or None where it has these already (the usual case, which
    costs a look at the names). ``options`` are those of ``from_pretrained``."""
    where = {name: options[name] for name in _WHERE if options.get(name) is not None}

    def find(file: str) -> Path | None:
        found = cached_file(name_or_path, file, _raise_exceptions_for_missing_entries=False, **where)
        return None if found is None else Path(found)

    index = find(_INDEX)
    if index is not None:
        of_file: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not any(name.endswith(_JOINED) for name in of_file):
            return None
        files = [find(file) for file in sorted(set(of_file.values()))]
    else:
        files = [find(_SINGLE)]
    weights: dict[str, Tensor] = {}
    for file in files:
        if file is None:  # no safetensors: from_pretrained says what is missing
            return None
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            if index is None and not any(name.endswith(_JOINED) for name in names):
                return None
            weights |= {name: opened.get_tensor(name) for name in names}
    return _renamed(weights)


def _renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    present: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name.endswith(_JOINED):
            stem = name.removesuffix("x_x")
            present |= {stem + part: shift.reshape(1, 1, -1).clone() for part, shift in zip(_PARTS, value, strict=True)}
        else:
            present[name] = value
    return present
