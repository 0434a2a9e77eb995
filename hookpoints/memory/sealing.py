"""Which model a saved memory belongs to."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor
from torch.nn import functional as F
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
