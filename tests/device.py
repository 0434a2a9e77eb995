"""A pretended accelerator `npu:0` for machines without a GPU: its tensors hold their data on the host. Tests that
compare a device with the host take the one that HOOKPOINTS_DEVICE names (`.ci/gpu`: cuda), which then is there.

What CUDA refuses raises here: tensors of two devices, NumPy on a tensor of a device, a generator of the other device.
What costs on CUDA is counted. Counts are exact: the same on every machine and beside any load.

    with device.pretended() as seen:
        model = HookedRecurrent.from_pretrained("embedded", device="npu")
        print(seen.of(lambda: model("text")), seen.worst("sync"))
"""

import collections
import os
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch
from backend import NPU, Generator, is_npu, load
from counted import INDEXES, Seen, mapped, tensors_of
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_NO_SCALARS = "cat stack mm bmm addmm baddbmm index_select gather embedding scatter scatter_ scatter_add_ dot"
NO_SCALARS = set(_NO_SCALARS.split())
"""Ops that take no tensor of the host, not even one without axes."""
MIXED = "Expected all tensors to be on the same device, but found at least two devices, npu:0 and cpu!"
NO_NUMPY = "can't convert npu:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
FACTORIES = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
OF_BOTH = {Tensor.__getitem__, Tensor.__setitem__, Tensor.data.__set__}
"""Functions whose first tensor may be the host's and another one the device's."""
PLACE = os.environ.get("HOOKPOINTS_DEVICE", "npu")
seen = Seen()


class Dev(Tensor):
    """A tensor of the pretended device. Its data lies on the host, in `held`."""

    @staticmethod
    def __new__(cls, held: Tensor):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        tensor = Tensor._make_wrapper_subclass(cls, held.size(), **layout, dtype=held.dtype, device=NPU)
        tensor.held = held
        return tensor

    __torch_dispatch__ = classmethod(lambda cls, func, types, args=(), kwargs=None: run(func, args, kwargs or {}))

    __repr__ = lambda self: f"Dev({self.held})"  # noqa: E731

    def __reduce_ex__(self, protocol):  # as PyTorch does for devices without storage
        if getattr(self, "_is_param", False):
            return torch._utils._rebuild_parameter, (self.detach(), self.requires_grad, collections.OrderedDict())
        return torch._utils._rebuild_device_tensor_from_cpu_tensor, (self.held, self.dtype, "npu:0", self.requires_grad)


def held_of(tree):
    """A tree with the data of its tensors of the device."""
    return mapped(lambda x: x.held if isinstance(x, Dev) else x, tree)


def run(func, args, kwargs):
    """One op, as the dispatcher calls it."""
    name, place = func.overloadpacket.__name__, kwargs.get("device")
    tensors = tensors_of((args, kwargs))
    ours = [x for x in tensors if isinstance(x, Dev)]
    to_npu = is_npu(place) if place is not None else bool(ours)
    options = dict(held_of(kwargs))
    if ours or to_npu:
        options |= {key: value for key, value in {"device": "cpu", "pin_memory": False}.items() if key in options}
    if name == "copy_":
        func(*held_of(args))
        seen.copy(name, args[1], args[0])
        return args[0]
    if name == "_to_copy":
        out = func(*held_of(args), **options)
        out = Dev(out) if to_npu else out
        seen.copy(name, args[0], out)
        return out
    hosts = [x for x in tensors if not isinstance(x, Dev) and (x.dim() or name in NO_SCALARS)]
    if name in INDEXES and ours:
        if not isinstance(args[0], Dev) and any(isinstance(x, Dev) for x in args[1]):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        hosts = [x for x in hosts if not any(x is index for index in args[1])]
    if ours and hosts:
        raise RuntimeError(f"{MIXED} ({func})")
    out = func(*held_of(args), **options)
    if ours or to_npu:
        seen.op(name, args, kwargs, out, NPU)
    if not to_npu:
        return out
    written = {id(x.held): x for x in ours}  # what is written in place is given back itself
    return mapped(lambda x: written[id(x)] if id(x) in written else Dev(x), out)


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if Dev not in types and not is_npu(kwargs.get("device")):  # of the host alone
            return func(*args, **kwargs)
        return run(func, args, kwargs)


class _Function(TorchFunctionMode):
    """What reaches no dispatcher, or only that of C++."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        options, first = dict(kwargs or {}), args[0] if args else None
        of_host = Dev not in types and not isinstance(first, Dev)
        if of_host and not options.keys() & {"device", "generator"} and func not in OF_BOTH:
            return func(*args, **options)
        place, generator = options.get("device"), options.get("generator")
        to_npu = is_npu(place) if place is not None else isinstance(first, Dev)
        if generator is not None and to_npu != getattr(generator, "on_npu", False):
            raise RuntimeError(f"Expected a '{'npu' if to_npu else 'cpu'}' device type for generator, got the other")
        if func in FACTORIES and to_npu:
            options.pop("device", None)
            grad = options.pop("requires_grad", False)  # of a leaf on the device
            if func is Tensor.new_tensor:
                func, args, options = torch.tensor, args[1:], {"dtype": first.dtype, **options}
            made = args[0] if isinstance(args[0], Tensor) else func(*args, **options)
            return made.to(NPU, options.get("dtype")).requires_grad_(grad or made.requires_grad)
        if not isinstance(first, Dev):
            return func(*args, **options)
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            at = tuple(map(index_of, args[1])) if isinstance(args[1], tuple) else index_of(args[1])
            return func(first, at, *args[2:])
        if func == Tensor.data.__set__ and isinstance(args[1], Dev):  # as modules do that change their dtype
            first.held = args[1].held
            return func(*args)
        if func in (Tensor.data_ptr, Tensor.untyped_storage):
            return func(first.held)
        if func is Tensor.__deepcopy__:  # which clones the storage of others
            return args[1].setdefault(id(first), first.detach().clone())
        if func is Tensor.tolist:
            seen.note("sync", "tolist")
            return first.held.tolist()
        if func in (Tensor.numpy, Tensor.__array__, Tensor.__dlpack__):
            raise TypeError(NO_NUMPY)
        return func(*args, **options)


def index_of(i):
    """Lists and arrays become indices on the device, as in C++."""
    if isinstance(i, (list, range)) or (type(i).__module__ == "numpy" and getattr(i, "ndim", 0)):
        index = torch.tensor(list(i) if isinstance(i, range) else i)
        return (index if len(index) else index.long()).to(NPU)
    return i


def as_subclass(tensor: Tensor, kind: type[Tensor], plain=Tensor.as_subclass):
    """A tensor of the device stays what it is: PyTorch finds one object behind both."""
    return tensor if isinstance(tensor, Dev) else plain(tensor, kind)


@contextmanager
def pretended():
    """A scope in which the device is there."""
    changed = mock.patch.multiple(torch, Generator=Generator, load=load)
    with _Dispatch(), _Function(), changed, mock.patch.object(Tensor, "as_subclass", as_subclass):
        yield seen


def there():
    """A scope in which `PLACE` is there."""
    return pretended() if PLACE == "npu" else nullcontext()
