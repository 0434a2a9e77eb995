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
}


@pytest.mark.parametrize("work", MIXED.values(), ids=MIXED)
def test_tensors_of_two_devices_raise(work):
    with pytest.raises(RuntimeError, match="device"):
        work()


@pytest.mark.parametrize("to_numpy", [torch.Tensor.numpy, np.asarray])
def test_numpy_refuses_a_tensor_of_the_device(to_numpy):
    with pytest.raises(TypeError, match="numpy"):
        to_numpy(there(2))
    assert to_numpy(there(2).cpu()).shape == (2,)


def test_a_generator_draws_for_its_device_only():
    host, ours = torch.Generator(), torch.Generator("npu").manual_seed(0)
    for draw in (
        lambda: torch.randn(2, device="npu", generator=host),
        lambda: torch.randn(2, generator=ours),
        lambda: there(3).uniform_(generator=host),
    ):
        with pytest.raises(RuntimeError, match="generator"):
            draw()
    assert torch.multinomial(there(3).abs(), 1, generator=ours).device == NPU


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
