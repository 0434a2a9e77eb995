"""Older formats of fla's checkpoints, mended: transformers would give weights that it does not find random values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from hookpoints.files import read_json

_GATE = "gate_proj.weight"
_UP = "up_proj.weight"
_JOINED = ".attn.x_x"
_PARTS = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")


def weight_files(source: str, **where: Any) -> list[str]:
    """The safetensors files of a folder or a repository; ``where`` are arguments of ``cached_file``."""
    where["_raise_exceptions_for_missing_entries"] = False
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **where)
    names = {SAFE_WEIGHTS_NAME}
    if index is not None:
        names = set(cast("dict[str, str]", read_json(Path(index))["weight_map"]).values())
    return [file for name in sorted(names) if (file := cached_file(source, name, **where)) is not None]


@torch.no_grad()
def split_gates(model: nn.Module, report: dict[str, Any], files: Iterable[str]) -> None:
    """Fill gate and up projections from a checkpoint of before 2025, which keeps both of an MLP in one matrix [2I,D],
    gate first. ``report`` is what transformers loaded and what not; it is mended, too."""
    gates = [key[0] for key in report["mismatched_keys"] if key[0].endswith(_GATE)]
    fused = {gate: up for gate in gates if (up := gate.removesuffix(_GATE) + _UP) in report["missing_keys"]}
    parameters = dict(model.named_parameters())
    for file in files if fused else ():
        with safe_open(file, framework="pt") as tensors:
            for name in fused.keys() & set(tensors.keys()):
                for target, part in zip((name, fused[name]), tensors.get_tensor(name).chunk(2), strict=True):
                    parameters[target].copy_(part)
    report["mismatched_keys"] = {key for key in report["mismatched_keys"] if key[0] not in fused}
    report["missing_keys"] = set(report["missing_keys"]) - set(fused.values())


def first_format(files: Iterable[str]) -> dict[str, Tensor] | None:
    """All weights of an RWKV-7 checkpoint under their present names, where it has the six token shifts of a layer as
    one tensor [6,D]; None where it has them apart (the usual case, which costs a look at the names)."""
    weights: dict[str, Tensor] = {}
    if not any(name.endswith(_JOINED) for file in files for name in _tensor_names(file)):
        return None
    for name, value in (pair for file in files for pair in load_file(file).items()):
        parts: Mapping[str, Tensor] = {name: value}
        if name.endswith(_JOINED):
            stem = name.removesuffix("x_x")
            parts = {stem + part: shift.reshape(1, 1, -1).clone() for part, shift in zip(_PARTS, value, strict=True)}
        weights |= parts
    return weights


def _tensor_names(file: str) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())
