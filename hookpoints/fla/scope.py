"""Where the substitutes act: inside a hooked model's forward, on CPU tensors. Everyone else meets fla as it is.

fla's modules call kernels by module-level names. Each such name is bound once to a wrapper that asks a context variable
whether a hooked fla model is running and the tensors whether they are on a CPU; if not, the function that fla had there
runs as if nothing had happened.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Iterator

from torch import Tensor, nn

from hookpoints.errors import UnsupportedModelError
from hookpoints.fla.substitutes import SUBSTITUTES, SUBSTITUTING, substituting
from hookpoints.layer.intercept import Function, wrap_forward

Keywords = dict[str, object]

_WRAPPED: dict[int, tuple[object, Function]] = {}
"""id of what fla had -> (it, kept alive; its wrapper)."""
_ABSENT = ("flash_attn_func", "flash_attn_varlen_func")
"""Functions of another package, None or not defined in fla where it is not installed."""


def install() -> None:
    """Bind fla's names to wrappers, wherever a module of fla refers to them. Doing it again only adds new modules."""
    for module_name, functions in SUBSTITUTES.items():
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # another version of fla
            continue
        for name, substitute in functions.items():
            original = getattr(module, name, None)
            if original is None:
                if name in _ABSENT:
                    setattr(module, name, _wrapper(_missing(name), substitute))
            elif id(original) not in _WRAPPED and not hasattr(original, "__hookpoints_substitute__"):
                _WRAPPED[id(original)] = (original, _wrapper(original, substitute))
    for name, module in list(sys.modules.items()):
        if name.startswith("fla.") and module is not None:
            _rebind(vars(module))
            if isinstance(table := vars(module).get("ACT2FN"), dict):
                _rebind(table)


def _rebind(names: dict[str, object]) -> None:
    for name, value in list(names.items()):
        if id(value) in _WRAPPED:
            names[name] = _WRAPPED[id(value)][1]


def _wrapper(original: Function, substitute: Function) -> Function:
    @functools.wraps(original)
    def call(*args: object, **kwargs: object) -> object:
        function = substitute if SUBSTITUTING.get() and _on_cpu(args, kwargs) else original
        return function(*args, **kwargs)

    call.__hookpoints_substitute__ = substitute  # type: ignore[attr-defined]
    return call


def _on_cpu(args: tuple[object, ...], kwargs: Keywords) -> bool:
    tensor = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
    return tensor is not None and tensor.device.type == "cpu"


def _missing(name: str) -> Function:
    def missing(*_args: object, **_kwargs: object) -> object:
        raise ImportError(f"{name} needs the package flash-attn, unless the model is hooked and on a CPU")

    missing.__name__ = name
    return missing


class ModelScope:
    """Opens the scope around each forward of an fla model, and sets two of its arguments right.

    * transformers 5.24 hands ``generate``'s cache over as ``cache``. fla 0.6 takes ``past_key_values``, ignores the
      rest, and so decodes each token as if it were the first: here it gets the cache under the name that it knows.
    * fla's layers unpad a batch whenever they get an attention mask. One that masks nothing (``generate`` always
      passes one) only costs time, so it is left out.
    """

    def __init__(self, model: nn.Module):
        _check(model)
        install()
        self._knows_cache = "cache" in inspect.signature(model.forward).parameters
        self._rebound = list(_functions_held(model))
        for module, name, original in self._rebound:
            module.__dict__[name] = _WRAPPED[id(original)][1]
        self._unwrap = wrap_forward(model, self._run)

    def remove(self) -> None:
        """Take everything off the model."""
        self._unwrap()
        for module, name, original in self._rebound:
            module.__dict__[name] = original

    def _run(self, forward: Function, args: tuple[object, ...], kwargs: Keywords) -> object:
        if kwargs.get("cu_seqlens") is not None:
            raise UnsupportedModelError(
                "packed sequences (cu_seqlens) cannot be hooked: pass a padded batch with its attention_mask"
            )
        with substituting():
            return forward(*args, **self._corrected(kwargs))

    def _corrected(self, kwargs: Keywords) -> Keywords:
        if kwargs.get("cache") is not None and not self._knows_cache:
            kwargs = {**kwargs, "past_key_values": kwargs["cache"]}
            del kwargs["cache"]
        mask = kwargs.get("attention_mask")
        masks_nothing = isinstance(mask, Tensor) and bool((mask != 0).all())
        return {**kwargs, "attention_mask": None} if masks_nothing else kwargs


def is_fla(model: nn.Module) -> bool:
    """Whether a model's class comes from fla."""
    return any(base.__module__.startswith("fla.") for base in type(model).__mro__)


def _check(model: nn.Module) -> None:
    if getattr(getattr(model, "config", None), "attnres_block_size", None) is not None:
        raise UnsupportedModelError(
            "this model mixes the outputs of all earlier blocks (attnres_block_size), so it has no residual stream "
            "for block hooks; models without it are supported"
        )


def _functions_held(model: nn.Module) -> Iterator[tuple[nn.Module, str, object]]:
    """Functions of fla that layers hold as attributes (their activations), from before the names were bound."""
    for module in model.modules():
        for name, value in list(module.__dict__.items()):
            if callable(value) and id(value) in _WRAPPED:
                yield module, name, value
