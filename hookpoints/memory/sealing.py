"""Which model a saved memory belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from hookpoints.errors import InputError
from hookpoints.files import atomic_write, tensors_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WORDS = {"cpu": 2**17, "cuda": 2**22}
"""Words of 8 bytes that are summed at once, by device: what fits into a cache, or few launches."""
_ODD = (0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64)
"""Multipliers of splitmix64 (Steele, Lea and Flood 2014), as signed integers."""


def fingerprint(model: PreTrainedModel, dtype: torch.dtype | None = None) -> str:
    """SHA-256 of the configuration, and of name, dtype, shape and `sum_of_bits` of each parameter and saved buffer.

    Args:
        dtype: weights are rounded to it first, and the configuration is left out, which another version of transformers
            may write in another way.

    The sums are made on the weights' device and are the same on every device; they are copied to the host together.
    Cost: one reading of all weights, on a CPU as much as their SHA-256 (0.6 s a GB on one core).
    """
    config = model.config.to_dict() if dtype is None else {}
    asked = {name: x for name, x in config.items() if not name.startswith("_") and name != "transformers_version"}
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode())
    weights = {name: x for name, x in model.state_dict().items() if isinstance(x, Tensor)}
    sums = [sum_of_bits(x.to(dtype) if dtype and x.is_floating_point() else x) for x in weights.values()]
    totals = torch.stack([total.to(sums[0].device) for total in sums]).tolist()
    for (name, weight), total in zip(weights.items(), totals, strict=True):
        digest.update(f"{name} {dtype or weight.dtype} {list(weight.shape)} {total}".encode())
    return digest.hexdigest()


def sum_of_bits(x: Tensor) -> Tensor:
    """A sum, modulo 2^64, over the words of 8 bytes of ``x``, each mixed with its place: an integer without axes, on
    the device of ``x``. Any change of one word changes it; other changes leave it with a chance of 2^-64."""
    octets = x.detach().contiguous().reshape(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    size = _WORDS.get(x.device.type, 2**22)
    for n, part in enumerate(octets.split(8 * size)):
        words = F.pad(part, (0, -len(part) % 8)).view(torch.int64)
        places = torch.arange(len(words), device=x.device) + n * size
        mixed = words + (places + 1) * _ODD[0]
        mixed = (mixed ^ (mixed >> 32)) * _ODD[1]
        total += (mixed ^ (mixed >> 29)).sum()
    return total


def save_sealed(path: str | Path, tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> None:
    """Write one safetensors file, aside and then renamed: tensors, their ``settings``, a SHA-256 of all of it.

    Raises:
        OSError: it cannot be written, or ``path`` is a link, a folder or a device, which is not replaced.
    """
    # Clones: safetensors refuses tensors that share memory, as views of one factor do.
    copies = {name: x.detach().clone(memory_format=torch.contiguous_format).cpu() for name, x in tensors.items()}
    sealed = {**settings, "sha256": tensors_hash(copies, settings)}
    atomic_write(Path(path), lambda file: save_file(copies, file, {"hookpoints": json.dumps(sealed)}))


def load_sealed(
    path: str | Path, what: str, identity: Mapping[str, object]
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The tensors of a file of `save_sealed`, and what it says of them, which has to agree with ``identity``. No code
    is run. ``what`` the file is, for errors.

    Raises:
        InputError: the file is damaged or another one, or was saved for another model, dtype or version.
        FileNotFoundError: there is none.
    """
    try:
        with safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {}).get("hookpoints", "{}"))
            named = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected a {what} that was saved, got a damaged file ({error})") from error
    settings = settings if isinstance(settings, dict) else {}
    if wrong := {name: settings.get(name) for name in identity if settings.get(name) != identity[name]}:
        raise InputError(f"{path}: expected {identity}, got {wrong}: saved for another model or version, or damaged")
    if settings.pop("sha256", None) != tensors_hash(named, settings):
        raise InputError(f"{path}: damaged, its SHA-256 is not that of what was saved: save the {what} again")
    return named, settings
