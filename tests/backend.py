"""The name of the pretended device, its module as PyTorch asks for one, its generators, and files that it reads."""

import pytest
import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_map

if not hasattr(torch._C, "_acc"):
    pytest.skip(f"torch {torch.__version__} registers no device from Python", allow_module_level=True)
HostGenerator, host_load = torch.Generator, torch.load


class _Module(backend_registration._DummyBackendModule):
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])
    manual_seed = manual_seed_all = synchronize = set_device = empty_cache = staticmethod(lambda *_: None)
    # Only while the device is pretended (`device.pretended`): DataParallel, say, takes any that there is.
    is_available = staticmethod(lambda: torch.Generator is not HostGenerator)
    mem_get_info = staticmethod(lambda *_: (70e9, 80e9))
    get_rng_state = staticmethod(lambda *_: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, *_: torch.set_rng_state(state))


backend_registration._setup_privateuseone_for_python_backend("npu", backend_module=_Module())
NPU = torch.device("npu:0")


class Generator(HostGenerator):
    """One of the host, which remembers for which device it was made."""

    def __new__(cls, device: object = "cpu"):
        generator = super().__new__(cls)
        generator.on_npu = is_npu(device)
        return generator


def is_npu(device) -> bool:
    return device is not None and torch.device(device).type == "npu"


def load(file, map_location=None, **options):
    """Storages have no device here: they are read to the host, and their tensors moved."""
    if callable(map_location) or not is_npu(map_location):
        return host_load(file, map_location=map_location, **options)
    return tree_map(lambda x: x.to(NPU) if isinstance(x, Tensor) else x, host_load(file, map_location="cpu", **options))
