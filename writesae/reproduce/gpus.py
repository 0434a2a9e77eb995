"""Several GPUs of one machine: each command of a workflow takes one that no other has."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

VARIABLE = "WRITESAE_GPUS"
"""The GPUs that a workflow may use, as CUDA_VISIBLE_DEVICES names them."""

_held: list[FileLock] = []
"""Locks of this process; the operating system lets go of them when it ends."""


def visible() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(n) for n in range(torch.cuda.device_count())]


def take_gpu(gpus: Sequence[str], folder: Path | None = None) -> str:
    """Take a free GPU for the life of this process, and show CUDA no other one; before torch is imported. The workflow
    starts no more steps than there are GPUs, so that one is free; where other programs break that, the first is shared.
    """
    folder = folder or Path(tempfile.gettempdir())
    for gpu in gpus:
        lock = FileLock(folder / f"writesae-gpu-{os.getuid()}-{gpu}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        _held.append(lock)
        break
    else:
        gpu = gpus[0]
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    return gpu
