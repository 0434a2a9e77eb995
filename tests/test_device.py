"""The pretended device does what CUDA does, and counts what CUDA would do."""

import device
import numpy as np
import pytest
import torch
from device import NPU


@pytest.fixture(autouse=True)
def seen():
    with device.pretended() as counts:
        yield counts


def there(*shape: int):
    return torch.randn(*shape, device="npu")


MIXED = {
    "add": lambda: there(3) + torch.ones(3),
    "device index of the host": lambda: torch.ones(3)[torch.tensor([0]).to(NPU)],
    "put": lambda: there(4).__setitem__(torch.tensor([0, 1]), torch.ones(2)),
    "numpy": lambda: np.asarray(there(2)),
    "a generator of the host": lambda: torch.randn(2, device="npu", generator=torch.Generator()),
}


@pytest.mark.parametrize("work", MIXED.values(), ids=MIXED)
def test_what_cuda_refuses_raises(work):
    with pytest.raises((RuntimeError, TypeError), match="device"):
        work()


COUNTS = {
    "item": (lambda x: x.sum().item(), {"launch": 1, "sync": 1}),
    "mask": (lambda x: x[x > 0], {"launch": 2, "sync": 1}),
    "cpu": (lambda x: x.cpu(), {"to_host": 1}),
    "list": (lambda x: x[[0, 1]], {"launch": 1, "to_device": 1}),
    "view": (lambda x: x.mT[1:], {}),
    "copy_": (lambda x: x[0].copy_(torch.ones(3)), {"to_device": 1}),
}


@pytest.mark.parametrize(("work", "expected"), COUNTS.values(), ids=COUNTS)
def test_counts(seen, work, expected):
    x = there(3, 3)
    counts = seen.of(lambda: work(x))
    assert {kind: n for kind, n in counts.items() if n and kind not in ("bytes", "bus")} == expected


def test_bytes_are_those_that_are_read_and_written(seen):
    x, rows = there(100, 8), torch.arange(2).to(NPU)
    assert seen.of(lambda: x + x)["bytes"] == 3 * 3200
    assert seen.of(lambda: x[rows])["bytes"] <= 2 * 64
    assert seen.of(x.cpu)["bus"] == 3200
