"""The seam between upstream's model and the hooks: ops and ``forward`` methods, wrapped and inert.

Layers keep their own projections, convolutions, gates, norms and caches. Each calls one op by its module-level name;
that name is bound here to a wrapper that asks a context variable which hooked layer is running. If none is, the
original op runs as if nothing had happened.

Modules are wrapped at their ``forward``, not with PyTorch's hooks: PyTorch skips a hook that should close what another
one opened when a KeyboardInterrupt passes, while a function's ``finally`` always runs.
"""

from __future__ import annotations

import copy
import functools
import inspect
import operator
import sys
import threading
import types
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

from hookpoints.rules.base import Rule

if TYPE_CHECKING:
    from transformers import AttentionInterface

Function = Callable[..., object]
Around = Callable[[Function, tuple[object, ...], dict[str, object]], object]
"""Stands around a module's forward: called with it and the call's arguments, returns what the module returns."""
Needed = Callable[[], bool]
"""Whether an ``Around`` has anything to do in a call that begins."""

_LOCK = threading.RLock()
"""Held while something is wrapped or unwrapped."""


# -- forward methods


class _WrappedForward:
    """Stands in for ``module.forward`` as an attribute of the instance, and calls it inside of ``arounds``.

    One object per module, however many hooked models share it: they come and go in any order. It is an object and not
    a function because ``copy.deepcopy`` and ``pickle`` must not carry it to a copy of the module, where it would still
    call the original: a copy gets its own plain ``forward``.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.replaced = module.__dict__.get("forward")  # accelerate sets one on the instance, too
        self.original: Function = module.forward
        self.arounds: tuple[tuple[Around, Needed | None], ...] = ()
        self.uncompiled = _uncompiled_call()
        self.__signature__ = inspect.signature(self.original)  # upstream looks at it
        # What accelerate wraps, as it does a bound method's; and what it unwraps this to, not upstream's own forward.
        self.__func__ = functools.partial(_call_unbound, cast(Function, self), module)
        self.__func__.__dict__.update(__name__="forward", __signature__=inspect.signature(type(module).forward))
        self.__wrapped__ = self.replaced or self.__func__

    def __call__(self, *args: object, **kwargs: object) -> object:
        # torch.compile would freeze the hooks of its first call, so a compiled model runs wrapped modules uncompiled.
        if torch.compiler.is_dynamo_compiling():
            return self.uncompiled(self, *args, **kwargs)
        forward = self.original
        for around, needed in self.arounds:
            if needed is None or needed():
                forward = functools.partial(_call_around, around, forward)
        return forward(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, object]) -> object:
        if self.replaced is not None:
            return copy.deepcopy(self.replaced, memo)
        return types.MethodType(type(self.module).forward, copy.deepcopy(self.module, memo))

    def __reduce__(self) -> tuple[Function, tuple[object, ...]]:
        if self.replaced is not None:
            return (copy.copy, (self.replaced,))
        return (getattr, (self.module, "forward"))


def _call_unbound(
    wrapped: Function, hooked: nn.Module, module: nn.Module, /, *args: object, **kwargs: object
) -> object:
    """As a function of the class; for a copy of the module, which has no hooks, it is that of the class."""
    if module is hooked:
        return wrapped(*args, **kwargs)
    return type(module).forward(module, *args, **kwargs)


def _called_plainly(wrapped: Function, *args: object, **kwargs: object) -> object:
    return wrapped(*args, **kwargs)


@functools.cache
def _uncompiled_call() -> Function:
    """Made with the first model: torch's compiler, which the decorator loads, takes seconds."""
    return torch.compiler.disable(_called_plainly)


def _call_around(around: Around, forward: Function, *args: object, **kwargs: object) -> object:
    return around(forward, args, kwargs)


def wrap_forward(module: nn.Module, around: Around, needed: Needed | None = None) -> Callable[[], None]:
    """Put ``around`` around the module's forward, outside of those already there, in calls in which it is ``needed``
    (None: in all); returns what takes it off."""
    entry = (around, needed)
    with _LOCK:
        # Through __dict__: some modules (TransformerLens') hand attributes that are set to others.
        wrapped = module.__dict__.get("forward")
        if not isinstance(wrapped, _WrappedForward):
            module.__dict__["forward"] = wrapped = _WrappedForward(module)
        wrapped.arounds = (*wrapped.arounds, entry)

    def unwrap() -> None:
        with _LOCK:
            wrapped.arounds = tuple(other for other in wrapped.arounds if other is not entry)
            if wrapped.arounds or module.__dict__.get("forward") is not wrapped:
                return  # what someone set on top of ours calls it still, and it does nothing
            if wrapped.replaced is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = wrapped.replaced

    return unwrap


# -- ops


class OpHandler(Protocol):
    """Takes over the op calls of one forward of a layer."""

    open: bool
    """Whether that forward is under way."""

    module: nn.Module
    """The layer."""

    @property
    def projection(self) -> nn.Module | None:
        """The layer's output projection, where its input has a hook."""
        ...

    def handle(self, op: Function, arguments: Mapping[str, object]) -> object: ...


_RUNNING: ContextVar[tuple[OpHandler, ...]] = ContextVar("hookpoints_running_layer", default=())
"""Handlers of the layer whose forward is under way, the innermost first; several where hooked models share a layer."""


def running(handler: OpHandler, forward: Function, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    """Call a layer's ``forward`` with its op calls routed to ``handler``.

    Handlers of one layer compose: the outer one receives the inner one as its op.
    """
    outer = _RUNNING.get()
    try:
        _RUNNING.set((handler, *(other for other in outer if other.module is handler.module)))
        return forward(*args, **kwargs)
    finally:
        handler.open = False  # first: should an interrupt skip the next line, a closed handler is ignored
        _RUNNING.set(outer)


def open_handlers() -> tuple[OpHandler, ...]:
    """Those of the layer whose forward is under way, the innermost first."""
    return tuple(filter(_OPEN, _RUNNING.get()))


_OPEN = operator.attrgetter("open")


def _handled_result(handlers: tuple[OpHandler, ...], op: Function, arguments: Mapping[str, object]) -> object:
    """The outermost handler is given the op as the others handle it."""
    *inner, outermost = handlers
    return outermost.handle(_handled_by(tuple(inner), op) if inner else op, arguments)


def _handled_by(handlers: tuple[OpHandler, ...], op: Function) -> Function:
    def call(**arguments: object) -> object:
        return _handled_result(handlers, op, arguments)

    call.__module__ = op.__module__
    plain = torch_form(op)
    if plain is not None and plain is not op:  # what ``torch_form`` looks for
        call.__wrapped__ = _handled_by(handlers, plain)  # type: ignore[attr-defined]
    return call


_USES: defaultdict[int, list[object]] = defaultdict(list)
"""Identity of a wrapper (tables have no hash) -> the wrapper, once for each hooked layer that needs it, which keeps its
identity from being another's."""


def wrap_ops(namespace: ModuleType, rule: Rule) -> Callable[[], None]:
    """Bind the rule's op names in ``namespace`` to wrappers; returns what undoes it. The last one to undo it puts the
    originals back."""
    return _rebind_names(
        namespace,
        (rule.ops, _wrap_op),
        (rule.companions, _wrap_companion),
        (rule.fused, functools.partial(_wrap_companion, fused=True)),
        (rule.norm_linear, _wrap_norm_linear),
    )


def wrap_attention(namespace: ModuleType) -> Callable[[], None]:
    """As `wrap_ops`, for the table from which attention takes the function that computes it."""
    return _rebind_names(namespace, (("ALL_ATTENTION_FUNCTIONS",), _wrap_functions))


def _rebind_names(namespace: ModuleType, *wrappers: tuple[Iterable[str], Callable[..., object]]) -> Callable[[], None]:
    bound: list[tuple[str, object]] = []
    with _LOCK:
        for names, wrap in wrappers:
            for name in names:
                op = getattr(namespace, name, None)
                if op is None:
                    continue
                if id(op) not in _USES:
                    op = wrap(op)
                    setattr(namespace, name, op)
                _USES[id(op)].append(op)
                bound.append((name, op))

    def unwrap() -> None:
        with _LOCK:
            while bound:  # emptied as it goes: called twice, it undoes nothing twice
                name, wrapper = bound.pop()
                _USES[id(wrapper)].pop()
                if not _USES[id(wrapper)]:
                    del _USES[id(wrapper)]
                    if getattr(namespace, name) is wrapper:
                        setattr(namespace, name, wrapper.__wrapped__)  # type: ignore[attr-defined]

    return unwrap


def in_torch(namespace: ModuleType, rule: Rule) -> bool:
    """Whether all ops of the rule are torch functions there; a layer that calls those needs no handler to run."""
    kernels = []
    for name in (*rule.ops, *rule.companions, *rule.fused, *rule.norm_linear):
        if (op := getattr(namespace, name, None)) is not None:
            op = op.__wrapped__ if id(op) in _USES else op
            plain = inspect.unwrap(op)
            # transformers decorates its torch functions, whether or not it found a kernel that stands in for them.
            closed_over = inspect.getclosurevars(op).nonlocals if op is not plain else {}
            kernels.append(closed_over.get("implementation", op) is not plain)
    return not any(kernels)


def torch_form(op: Function) -> Function | None:
    """The torch function that ``op`` is or stands in for; None for fla's own, which are Triton kernels."""
    form = inspect.unwrap(op)
    return None if form.__module__.startswith("fla.") else form


def _wrap_op(op: Function, on_device: bool = True) -> Function:
    plain = inspect.unwrap(op)
    parameters = inspect.signature(plain).parameters
    names = [name for name, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    defaults = {name: parameters[name].default for name in names if parameters[name].default is not inspect._empty}
    # fla's ops take any keyword; those that an op does not take are dropped, as upstream does with other kernels'.
    known = _known_keywords(plain)

    @functools.wraps(op)
    def wrapper(*args: object, **kwargs: object) -> object:
        handlers = open_handlers()
        if not handlers:
            return op(*args, **kwargs)
        positional = tuple(names[: len(args)])
        # The rule reads factors by name, and the layer may give any of them by position or leave them out.
        named = {name: value for name, value in kwargs.items() if known is None or name in known}
        arguments = defaults | dict(zip(positional, args)) | named
        for_device = _on_device(op, plain, args, kwargs) if on_device else op
        return _handled_result(handlers, _by_name(for_device, positional), arguments)

    return wrapper


@functools.lru_cache
def _by_name(op: Function, positional: tuple[str, ...]) -> Function:
    """The op, taking every argument by name. What the layer gave by position is passed by position: fast kernels
    stand in for the torch op under other names (``q`` for ``query``, ``x`` for ``hidden_states``)."""
    known = _known_keywords(op)

    @functools.wraps(op)
    def call(**arguments: object) -> object:
        first = [arguments.pop(name) for name in positional]
        if known is not None:
            arguments = {name: x for name, x in arguments.items() if name in known}
        return op(*first, **arguments)

    return call


def _known_keywords(op: Function) -> frozenset[str] | None:
    """Names that ``op`` itself takes, whatever it stands in for; None where it takes any."""
    parameters = inspect.signature(op, follow_wrapped=False).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    return frozenset(parameters)


def _wrap_functions(table: AttentionInterface) -> AttentionInterface:
    """A view of a table of attention functions that, while a hooked layer runs, gives them wrapped."""

    def get_interface(*args: str | Function) -> Function:
        function = table.get_interface(*args)  # type: ignore[arg-type]
        return _wrap_op(function, on_device=False) if open_handlers() else function

    view = copy.copy(table)
    vars(view).update(__wrapped__=table, get_interface=get_interface)
    return view


def _wrap_companion(op: Function, fused: bool = False) -> Function:
    """While a hooked layer runs, the op for the tensors' device. Of a ``fused`` op it is the torch stand-in, which
    declines, so that the layer calls its own."""

    plain = inspect.unwrap(op)

    @functools.wraps(op)
    def wrapper(*args: object, **kwargs: object) -> object:
        run = op if not open_handlers() else plain if fused else _on_device(op, plain, args, kwargs)
        return run(*args, **kwargs)

    return wrapper


def _wrap_norm_linear(op: Function) -> Function:
    """With a hook between them, the norm and the projection of one kernel run one after the other."""
    norm = getattr(sys.modules[op.__module__], "rms_norm")  # noqa: B009 (a module has no attributes for pyright)

    @functools.wraps(op)
    def wrapper(
        x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, weight: Tensor, bias: Tensor | None, **options: object
    ) -> object:
        project = next(filter(None, (handler.projection for handler in open_handlers())), None)
        if project is None:
            return op(x, norm_weight, norm_bias, weight, bias, **options)
        return project(norm(x, norm_weight, norm_bias, **options))

    return wrapper


def _on_device(op: Function, plain: Function, args: tuple[object, ...], kwargs: dict[str, object]) -> Function:
    """The op for the tensors' device. With fla installed, transformers takes fla's Triton kernels on any device and
    crashes on a CPU; the torch original, ``plain``, is underneath the decorators."""
    tensor = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
    return op if tensor is None or tensor.device.type != "cpu" else plain
