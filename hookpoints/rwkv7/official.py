"""Official RWKV-7 files (``.pth``): the tensors that one holds, and names, orientation and sizes of a checkpoint's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from zipfile import is_zipfile

import torch
from torch import Tensor

from hookpoints.errors import InputError, UnsupportedModelError, require_whole
from hookpoints.recurrence.canonical import is_dense
from hookpoints.rwkv7.configuration import RWKV7Config

_OFFICIAL = {
    r"^model\.embeddings": "emb",
    r"^model\.norm": "ln_out",
    r"^lm_head": "head",
    r"^model\.layers": "blocks",
    r"\.pre_norm": ".ln0",
    r"\.attn_norm": ".ln1",
    r"\.ffn_norm": ".ln2",
    r"\.attn": ".att",
    r"g_norm": "ln_x",
    r"r_proj": "receptance",
    r"k_proj": "key",
    r"v_proj": "value",
    r"o_proj": "output",
    r"_lora\.lora\.0\.weight": "1",
    r"_lora\.lora\.2\.weight": "2",
    r"_lora\.lora\.2\.bias": "0",
}
"""Patterns in the names of parameters here -> the official words, in this order."""
_SIZES = ("emb.weight", "blocks.0.att.r_k", "blocks.0.ffn.key.weight", *(f"blocks.0.att.{x}1" for x in "wag"))
"""Tensors of two axes whose shapes give the configuration."""
_UNUSED = {f"blocks.0.att.v{part}" for part in "012"}
"""Layer 0 mixes in no values; many checkpoints have these tensors there all the same."""


def stored_tensors(path: str | Path, mmap: bool = False) -> dict[str, Tensor]:
    """The tensors by name of a file that ``torch.save`` wrote. No code from the file is run.

    Args:
        mmap: the tensors stay on disk until they are read, where the file is a zip archive.

    Raises:
        InputError: the file is damaged, or holds something else, as code or sparse tensors.
        FileNotFoundError: there is none.
    """
    expected = f"{path}: expected dense tensors by name, as torch.save writes them"
    try:
        stored = dict[str, Tensor](
            torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zipfile(path))
        )
    except OSError:
        raise
    except Exception as error:  # those of the unpickler, the archive and storages have no narrower class
        raise InputError(f"{expected}, got code, another object or a damaged file ({type(error).__name__})") from error
    for name, x in stored.items():
        if not isinstance(name, str) or not is_dense(x):
            raise InputError(f"{expected}, got {name!r}: {getattr(x, 'layout', type(x).__name__)}")
    return stored


def configuration(weights: Mapping[str, Tensor], name: str) -> RWKV7Config:
    """What the shapes of official tensors say; ``name`` is what errors call them. Refuses as `own_weights` does."""
    # Before any shape is read: someone else's file may hold anything.
    for matrix in _SIZES:
        if matrix not in weights or weights[matrix].ndim != 2:
            raise UnsupportedModelError(f"{name!r} is no official RWKV-7 checkpoint: it lacks the matrix {matrix}")
    matches = [re.match(r"blocks\.(\d{1,6})\.", weight) for weight in weights]
    blocks = {int(match[1]) for match in matches if match}
    layers = len(blocks)
    if max(blocks) != layers - 1:  # before a model of that many layers is built
        gap = min({*range(layers)} - blocks)
        raise UnsupportedModelError(
            f"{name!r} is no official RWKV-7 checkpoint: it has block {max(blocks)} and lacks block {gap}"
        )
    embeddings, bonus, inner, decay, rate, gate = [weights[matrix].shape for matrix in _SIZES]
    mixed = weights.get("blocks.1.att.v1")
    return RWKV7Config(
        vocab_size=embeddings[0],
        hidden_size=embeddings[1],
        num_hidden_layers=layers,
        head_dim=bonus[1],
        intermediate_size=inner[0],
        decay_low_rank_dim=decay[1],
        a_low_rank_dim=rate[1],
        gate_low_rank_dim=gate[1],
        v_low_rank_dim=mixed.shape[-1] if mixed is not None else rate[1],
        norm_first="blocks.0.ln0.weight" in weights,
        head_norm_eps=64e-5,
        bos_token_id=None,
        eos_token_id=0,
    )


def own_weights(
    parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor], name: str, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Copies of official tensors under the names and in the shapes of a model's parameters.

    Raises:
        UnsupportedModelError: tensors are missing, unknown or of another shape; names them.
    """
    claimed = sum(value.numel() * value.element_size() for value in weights.values())
    storages = {value.untyped_storage()._cdata: value.untyped_storage().nbytes() for value in weights.values()}
    if claimed > sum(storages.values()):  # a stride of 0 repeats a number as often as a shape says
        raise UnsupportedModelError(
            f"{name!r} is no official RWKV-7 checkpoint: expected tensors that are stored whole, {claimed} bytes, got "
            f"{sum(storages.values())}; save contiguous copies of them"
        )
    expected_parameters = {_official_name(name): (name, parameter) for name, parameter in parameters.items()}
    misshapen = set()
    for official in expected_parameters.keys() & weights.keys():
        parameter_name, parameter = expected_parameters[official]
        if _oriented_tensor(weights[official], parameter_name).shape != parameter.squeeze().shape:
            misshapen.add(official)
    require_whole(
        f"{name!r} is not a whole official RWKV-7 checkpoint",
        {
            "lacks": expected_parameters.keys() - weights.keys(),
            "has the unknown": weights.keys() - expected_parameters.keys() - _UNUSED,
            "has the wrong shape of": misshapen,
        },
        "Only pure RWKV-7 is read; download the file again, or name its tensors as the official code does",
    )
    copies = dict[str, Tensor]()
    for official, (parameter_name, parameter) in expected_parameters.items():
        value = _oriented_tensor(weights[official], parameter_name).reshape(parameter.shape)
        copies[parameter_name] = value.to(dtype, copy=True).contiguous()
    return copies


def _official_name(name: str) -> str:
    for pattern, word in _OFFICIAL.items():
        name = re.sub(pattern, word, name)
    return name


def _oriented_tensor(value: Tensor, name: str) -> Tensor:
    """An official tensor as the parameter ``name`` has it, but for axes of size 1."""
    value = value.squeeze()
    if name.endswith(("lora.0.weight", "lora.2.weight")):
        return value.transpose(0, -1)
    return value
