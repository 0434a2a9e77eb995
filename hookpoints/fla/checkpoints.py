"""Loading fla's checkpoints, older formats included. What does not fit the model is refused by name: transformers would
give missing weights random values and drop those it does not know.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from hookpoints.errors import UnsupportedModelError
from hookpoints.files import read_json

_GATE, _UP = "gate_proj.weight", "up_proj.weight"


class _Misfits(NamedTuple):
    """Names of weights on which a checkpoint and the model do not agree."""

    missing: set[str]
    unexpected: set[str]
    other_shape: set[str]


def load_checkpoint(source: str, config: PreTrainedConfig, *, revision: str | None, **hf_kwargs: object) -> nn.Module:
    """The causal language model of a checkpoint in fla's format.

    Checkpoints from before 2025 keep the gate and the up projection of each MLP in one matrix [2I,D], gate first; they
    are split. Their mode ``fused_chunk``, which fla has dropped, was another schedule of the same rule as ``chunk``.

    Args:
        config: of the checkpoint; changed where its mode is not known any more.
        hf_kwargs: for ``from_pretrained``.

    Raises:
        UnsupportedModelError: weights that the model lacks or has in excess; names them.
    """
    if getattr(config, "attn_mode", None) == "fused_chunk" and config.model_type != "retnet":
        config.attn_mode = "chunk"  # type: ignore[attr-defined]
    options: dict[str, object] = {"revision": revision, "use_safetensors": True, **hf_kwargs}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **options
    )
    model, info = loaded
    misfits = _Misfits(
        set(info["missing_keys"]), set(info["unexpected_keys"]), {name for name, *_ in info["mismatched_keys"]}
    )
    fused = {name for name in misfits.other_shape if name.endswith(_GATE) and _up(name) in misfits.missing}
    if fused:
        _split(model, fused, _files(source, revision))
    _refuse(source, misfits, fused)
    return model


def _up(gate: str) -> str:
    return gate.removesuffix(_GATE) + _UP


@torch.no_grad()
def _split(model: nn.Module, fused: Iterable[str], files: Iterator[str]) -> None:
    """Fill the gate and up projections from the matrices [2I,D] of the checkpoint."""
    wanted, parameters = set(fused), dict(model.named_parameters())
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in wanted & set(tensors.keys()):
                whole: Tensor = tensors.get_tensor(name)
                for target, part in zip((name, _up(name)), whole.chunk(2), strict=True):
                    parameters[target].copy_(part)


def _files(source: str, revision: str | None) -> Iterator[str]:
    """The safetensors files of a folder or a repository, which are on disk by now."""
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
    names = {SAFE_WEIGHTS_NAME}
    if index is not None:
        names = set(cast("dict[str, str]", read_json(Path(index))["weight_map"]).values())
    for name in sorted(names):
        file = cached_file(source, name, revision=revision)
        assert file is not None
        yield file


def _refuse(source: str, misfits: _Misfits, mended: set[str]) -> None:
    kinds = {
        "lacks": misfits.missing - {_up(name) for name in mended},
        "has besides": misfits.unexpected,
        "has in another shape": misfits.other_shape - mended,
    }
    faults = [f"{kind} {_some(names)}" for kind, names in kinds.items() if names]
    if faults:
        raise UnsupportedModelError(
            f"{source!r} does not fit the installed flash-linear-attention: of the model's weights it "
            f"{'; it '.join(faults)}. Load it with the version of fla that it was made for and save it anew, or take a "
            "newer revision of it"
        )


def _some(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
