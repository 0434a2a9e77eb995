"""The pretended device does what CUDA does, and counts what CUDA would do."""

import copy
import io
import pickle

import device
import numpy as np
import pytest
import torch
from device import NPU
from safetensors.torch import load_file, save_file


@pytest.fixture(autouse=True)
def seen():
    with device.pretended() as counts:
        yield counts


def there(*shape: int):
    return torch.randn(*shape, device="npu")


MIXED = {
    "add": lambda: there(3) + torch.ones(3),
    "stack of scalars": lambda: torch.stack([there(2).sum(), torch.tensor(1.0)]),
    "device index of the host": lambda: torch.ones(3)[torch.tensor([0]).to(NPU)],
    "in place on the host": lambda: torch.ones(3).add_(there(1).sum()),
    "gather": lambda: there(3, 3).gather(0, torch.zeros(1, 1, dtype=torch.long)),
    "put": lambda: there(4).__setitem__(torch.tensor([0, 1]), torch.ones(2)),
}


@pytest.mark.parametrize("work", MIXED.values(), ids=MIXED)
def test_tensors_of_two_devices_raise(work):
    with pytest.raises(RuntimeError, match="device"):
        work()


def test_a_number_of_the_host_mixes():
    x = there(3)
    assert (x * torch.tensor(2.0)).device == NPU
    assert torch.where(x > 0, x, torch.tensor(0.0)).device == NPU
    x[0] = torch.tensor(1.0)
    x[torch.tensor([1]).to(NPU)] = torch.tensor(5.0)
    assert x.tolist()[:2] == [1.0, 5.0]


@pytest.mark.parametrize("to_numpy", [torch.Tensor.numpy, np.asarray])
def test_numpy_refuses_a_tensor_of_the_device(to_numpy):
    with pytest.raises(TypeError, match="numpy"):
        to_numpy(there(2))
    assert to_numpy(there(2).cpu()).shape == (2,)


def test_a_generator_draws_for_its_device_only():
    host, ours = torch.Generator(), torch.Generator("npu").manual_seed(0)
    for draw in (
        lambda: torch.randn(2, device="npu", generator=host),
        lambda: torch.multinomial(there(3).abs(), 1, generator=host),
        lambda: torch.randn(2, generator=ours),
        lambda: there(3).uniform_(generator=host),
        lambda: torch.randperm(3, device="npu", generator=host),
    ):
        with pytest.raises(RuntimeError, match="generator"):
            draw()
    assert torch.multinomial(there(3).abs(), 1, generator=ours).device == NPU


COUNTS = {
    "item": (lambda x: x.sum().item(), {"launch": 1, "sync": 1}),
    "tolist": (lambda x: x.tolist(), {"sync": 1}),
    "nonzero": (lambda x: x.nonzero(), {"launch": 1, "sync": 1}),
    "mask": (lambda x: x[x > 0], {"launch": 2, "sync": 1}),
    "a number at a mask": (lambda x: x.__setitem__(x > 0, 0.0), {"launch": 3}),
    "rows at a mask": (lambda x: x.__setitem__(x[0] > 9, x[:0]), {"launch": 2, "sync": 1}),
    "cpu": (lambda x: x.cpu(), {"to_host": 1}),
    "list": (lambda x: x[[0, 1]], {"launch": 1, "to_device": 1}),
    "empty list": (lambda x: x[:, []], {"launch": 1, "to_device": 1}),
    "range": (lambda x: x[range(2)], {"launch": 1, "to_device": 1}),
    "index of the host": (lambda x: x[torch.tensor([0])], {"launch": 1, "to_device": 1}),
    "tensor": (lambda x: torch.tensor([1.0], device="npu"), {"to_device": 1}),
    "new_tensor": (lambda x: x.new_tensor([1.0]), {"to_device": 1}),
    "view": (lambda x: x.mT[1:], {}),
    "double": (lambda x: x.double(), {"launch": 1}),
    "same dtype": (lambda x: x.float(), {}),
    "copy_": (lambda x: x[0].copy_(torch.ones(3)), {"to_device": 1}),
    "where": (lambda x: x.where(x > 0, 0), {"launch": 3}),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 0), {"launch": 1}),
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


def test_views_and_writes_in_place_share_memory():
    x = there(4, 4)
    x.view(2, 8)[0].zero_()
    assert float(x.abs().sum(1)[:2].sum()) == 0
    flipped = x.t()
    flipped += 1
    assert float(x[0, 0]) == 1
    out = torch.empty(4, 4, device="npu")
    assert torch.add(x, 1, out=out) is out and float(out[0, 0]) == 2
    host = torch.ones(3)
    host[:] = there(3)
    assert host.device.type == "cpu" and not torch.equal(host, torch.ones(3))


def test_tensors_and_modules_are_kept(tmp_path):
    x, module = there(3, 3), torch.nn.Linear(3, 2).to("npu")
    assert copy.deepcopy(x).device == NPU and copy.deepcopy(module).weight.device == NPU
    assert pickle.loads(pickle.dumps(x)).tolist() == x.tolist()
    file = io.BytesIO()
    torch.save({"x": x, "module": module.state_dict()}, file)
    for place in (None, "cpu", "npu"):
        file.seek(0)
        kept = torch.load(file, map_location=place, weights_only=True)["x"]
        assert kept.tolist() == x.tolist() and kept.device.type == (place or "npu")
    save_file({"x": x}, tmp_path / "x")
    assert load_file(tmp_path / "x")["x"].tolist() == x.tolist()
    assert load_file(tmp_path / "x", device="npu")["x"].device == NPU
    module.load_state_dict({name: value.cpu() for name, value in module.state_dict().items()})
    assert module.weight.device == NPU
