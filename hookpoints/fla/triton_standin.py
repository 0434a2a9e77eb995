"""Importing fla where triton is not installed: an inert stand-in for the length of the import, and gone after it.

fla's modules define Triton kernels when they are imported. Without triton they cannot even be imported, although its
layers are plain PyTorch around those kernels. Inside ``standing_in``, names of triton resolve to objects that can
decorate, be subclassed and be passed around, and that raise as soon as a kernel is launched. ``sys.modules`` is left
without them, so that PyTorch and transformers do not come to believe that triton is there.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NoReturn

from hookpoints.scopes import scoped

VERSION = "3.3.0"
"""The oldest triton that fla accepts; it only ever compares the number."""


def has_triton() -> bool:
    """Whether a real triton is installed (not whether there is a GPU to run it on)."""
    return "triton" in sys.modules or importlib.util.find_spec("triton") is not None


class KernelLaunchError(RuntimeError):
    """A Triton kernel was launched, but triton is not installed."""


class _Kernel:
    """Stands for a compiled kernel: it has a name, and cannot be launched."""

    def __init__(self, fn: object = None, *_args: object, **_kwargs: object):
        self.fn = fn
        self.arg_names: tuple[str, ...] = ()
        self.__name__ = getattr(fn, "__name__", type(self).__name__)

    def _launch(self, *_args: object, **_kwargs: object) -> NoReturn:
        raise KernelLaunchError(
            f"the Triton kernel {self.__name__} was launched, but triton is not installed. Models of "
            "flash-linear-attention run without it only through hookpoints, and only on a CPU: call the model while it "
            "is hooked (HookedRecurrent.from_hf or from_pretrained), or install triton and move it to a GPU"
        )

    __call__ = __getitem__ = run = warmup = _launch

    def __getattr__(self, name: str) -> _Symbol:
        return _child("triton.kernel", name)


class _Symbol:
    """Anything else that triton might export."""

    def __init__(self, name: str):
        self._name = name
        self.__name__ = name.rsplit(".", 1)[-1]

    def __call__(self, *args: object, **kwargs: object) -> _Kernel | _Symbol:
        """As a decorator (``jit``, or what ``autotune(...)`` returned) gives a kernel; else another symbol."""
        if len(args) == 1 and not kwargs and (isinstance(args[0], _Kernel) or hasattr(args[0], "__code__")):
            return args[0] if isinstance(args[0], _Kernel) else _Kernel(args[0])
        return _Symbol(self._name)

    def __getattr__(self, name: str) -> _Symbol:
        return _child(self._name, name)

    def __mro_entries__(self, _bases: tuple[object, ...]) -> tuple[type, ...]:
        return (_Kernel,)

    def __repr__(self) -> str:
        return f"<stand-in for {self._name}>"


def _child(parent: str, name: str) -> _Symbol:
    if name.startswith("__"):
        raise AttributeError(name)
    if name == "active":  # triton.runtime.driver.active: as triton itself does where it finds no GPU
        raise RuntimeError("0 active drivers: triton is not installed")
    return _Symbol(f"{parent}.{name}")


class _Module(ModuleType):
    """A stand-in module; a package, so that its submodules can be imported."""

    __path__: MutableSequence[str] = []  # noqa: RUF012
    __version__ = VERSION

    def __getattr__(self, name: str) -> object:
        if self.__name__ == "triton" and name in _ARITHMETIC:
            return _ARITHMETIC[name]
        return _child(self.__name__, name)


_ARITHMETIC: dict[str, Callable[..., int]] = {
    "cdiv": lambda x, y: -(-x // y),
    "next_power_of_2": lambda n: 1 << (n - 1).bit_length(),
}
"""Triton's helpers for the sizes of a launch: with them, what fails is the launch, which says why."""


class _Finder(MetaPathFinder, Loader):
    """Finds triton and everything below it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if _is_triton(fullname) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def _is_triton(name: str) -> bool:
    return name == "triton" or name.startswith("triton.")


@scoped
def standing_in() -> Iterator[None]:
    """Let ``import triton`` give the stand-in until the context is left. Must not be used where triton is installed."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if _is_triton(name)]:
            del sys.modules[name]
