"""The seam: upstream ops, wrapped once per module, inert unless a hooked mixer is running.

Layers keep their own projections, convolutions, gates, norms and caches. Each calls one op by its module-level name;
that name is bound here to a wrapper that asks a context variable which hooked mixer is running. If none is, the
original op runs as if nothing had happened.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any, Protocol

from torch import Tensor, nn

from hookpoints.rules import Rule


class OpHandler(Protocol):
    """A hooked mixer: takes over the op calls of its layer."""

    @property
    def module(self) -> nn.Module:
        """The layer."""
        ...

    def handle(self, op: Callable[..., Any], arguments: Mapping[str, Any]) -> Any: ...


_RUNNING: ContextVar[OpHandler | None] = ContextVar("hookpoints_running_mixer", default=None)
_MARK = "__hookpoints_wrapper__"


@contextmanager
def running(handler: OpHandler) -> Iterator[None]:
    """While this is open, op calls go to ``handler``; of several on one layer, each stands in for the next one's op."""
    outer = _RUNNING.get()
    if outer is not None and outer.module is handler.module:
        handler = _Chain(outer, handler)
    token = _RUNNING.set(handler)
    try:
        yield
    finally:
        _RUNNING.reset(token)


class _Chain:
    """Two handlers of one layer: the op that the second is given is the first with its op."""

    def __init__(self, first: OpHandler, second: OpHandler):
        self.first, self.second, self.module = first, second, second.module

    def handle(self, op: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        through = self._through(op)
        plain = torch_form(op)
        if plain is not None and plain is not op:  # what ``torch_form`` looks for
            through.__wrapped__ = self._through(plain)  # type: ignore[attr-defined]
        return self.second.handle(through, arguments)

    def _through(self, op: Callable[..., Any]) -> Callable[..., Any]:
        def call(**arguments: Any) -> Any:
            return self.first.handle(op, arguments)

        call.__module__ = op.__module__
        return call


def wrap_ops(namespace: ModuleType, rule: Rule) -> None:
    """Bind the rule's op names in ``namespace`` to wrappers. Doing it twice changes nothing."""
    wrappers = ((rule.ops, _wrap_op), (rule.companions, _wrap_companion), (rule.fused, _wrap_fused))
    for names, wrap in wrappers:
        for name in names:
            op = getattr(namespace, name, None)
            if op is not None and not hasattr(op, _MARK):
                setattr(namespace, name, wrap(op))


def torch_form(op: Callable[..., Any]) -> Callable[..., Any] | None:
    """The torch function that ``op`` is or stands in for; None for fla's own, which are Triton kernels."""
    form = inspect.unwrap(op)
    return None if form.__module__.startswith("fla.") else form


def _wrap_op(op: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(inspect.unwrap(op))

    @functools.wraps(op)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        handler = _RUNNING.get()
        if handler is None:
            return op(*args, **kwargs)
        positional = tuple(signature.parameters)[: len(args)]
        chosen = _on_device(op, args, kwargs)
        return handler.handle(_by_name(chosen, positional), _bind(signature, args, kwargs))

    setattr(wrapper, _MARK, True)
    return wrapper


def _by_name(op: Callable[..., Any], positional: tuple[str, ...]) -> Callable[..., Any]:
    """The op, taking every argument by name. What the layer gave by position is passed by position: fast kernels
    stand in for the torch op under other names (``q`` for ``query``, ``x`` for ``hidden_states``)."""

    @functools.wraps(op)
    def call(**arguments: Any) -> Any:
        first = [arguments.pop(name) for name in positional]
        known = _keywords(op)
        return op(*first, **(arguments if known is None else {n: x for n, x in arguments.items() if n in known}))

    return call


@functools.cache
def _keywords(op: Callable[..., Any]) -> frozenset[str] | None:
    """Names that ``op`` itself takes, whatever it stands in for; None where it takes any."""
    parameters = inspect.signature(op, follow_wrapped=False).parameters
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else frozenset(parameters)


def _wrap_companion(op: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(op)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        chosen = op if _RUNNING.get() is None else _on_device(op, args, kwargs)
        return chosen(*args, **kwargs)

    setattr(wrapper, _MARK, True)
    return wrapper


def _wrap_fused(op: Callable[..., Any]) -> Callable[..., Any]:
    """While a hooked mixer runs, the torch stand-in answers, which declines, so that the layer calls its op."""

    @functools.wraps(op)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return (op if _RUNNING.get() is None else inspect.unwrap(op))(*args, **kwargs)

    setattr(wrapper, _MARK, True)
    return wrapper


def _on_device(op: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
    """The op for the tensors' device. With fla installed, transformers takes fla's Triton kernels on any device and
    crashes on a CPU; the torch original is underneath the decorators."""
    tensor = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
    return op if tensor is None or tensor.device.type != "cpu" else inspect.unwrap(op)


def _bind(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, defaults filled in. Keywords that the op does not name are kept where it takes any (fla's ops
    do), else dropped, as upstream does with those that only other kernels take."""
    known = {name: value for name, value in kwargs.items() if name in signature.parameters}
    bound = signature.bind(*args, **known)
    bound.apply_defaults()
    named = {name: value for name, value in bound.arguments.items() if name not in ("kwargs", "args")}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    return {**kwargs, **named} if open_ended else named
