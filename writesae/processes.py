"""Which of several processes this is, and which GPU it has. Loads no torch, for the sake of help."""

from __future__ import annotations

import os


def part() -> tuple[int, int]:
    """Number of this process among those that torchrun started, and how many these are; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def choose_device(name: str | None) -> None:
    """Show this process one GPU, or none; to be called before anything is on one. All libraries and threads, and
    processes that this one starts, go by `CUDA_VISIBLE_DEVICES`.

    Args:
        name: cpu, cuda, or cuda:N of the GPUs that this process sees. None: under torchrun the GPU whose turn it is,
            and else nothing is chosen.

    Raises:
        ValueError: there is no such device.
    """
    rank = os.environ.get("LOCAL_RANK")
    if name is None and rank is None:
        return
    devices = _visible_devices()
    known = {"cpu": ""} | ({"cuda": ",".join(devices)} if devices else {})
    known |= {f"cuda:{number}": device for number, device in enumerate(devices)}
    if name is None:
        name = f"cuda:{int(rank or 0) % len(devices)}" if devices else "cpu"
    if name not in known:
        raise ValueError(f"device: expected one of this machine ({', '.join(known)}), got {name!r}")
    os.environ["CUDA_VISIBLE_DEVICES"] = known[name]


def _visible_devices() -> list[str]:
    """GPUs that this process sees, as `CUDA_VISIBLE_DEVICES` names them."""
    import torch

    n_devices = torch.cuda.device_count()  # which begins no work on them
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [*map(str, range(n_devices))])[:n_devices]
