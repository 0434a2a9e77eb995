"""The errors that hookpoints raises. Each says what was expected, what it got and the fix.

Every error is also of the built-in kind that fits it (`ValueError`, `KeyError`, ...), so that code which does not know
hookpoints can catch it.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar, cast

T = TypeVar("T")


class HookpointsError(Exception):
    """The base class of all errors of hookpoints."""


class UnknownHookError(HookpointsError, KeyError):
    """The model has no hook of this name. The message lists the nearest names."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


class HookDidNotFireError(HookpointsError, RuntimeError):
    """A hook or an edit was set and the model ran, but the hook was never called or the edit never applied."""


class HookShapeError(HookpointsError, ValueError):
    """A hook returned a value that cannot replace the activation: no tensor, or one of another shape or device."""


class UnknownModelError(HookpointsError, OSError):
    """No model of this name is at hand, or the hub does not give it. The message lists the nearest names."""


class UnsupportedModelError(HookpointsError, ValueError):
    """The recurrence of this model cannot be hooked, or a package that it needs is not installed."""


class ChecksumError(HookpointsError, ValueError):
    """A file is a link, is outside its folder, or is not the one that the checksums of the folder list."""


class SelfCheckError(HookpointsError, RuntimeError):
    """The model does not behave as its hooks assume. It is refused, since its hooks would be silently wrong."""


class EditError(HookpointsError, ValueError):
    """A `WriteEdit` does not fit the model or the tokens."""


class InputError(HookpointsError, ValueError):
    """The model cannot take these token ids, this attention mask or this memory."""


class BridgeWarning(UserWarning):
    """Some hooks of a TransformerBridge do not fire while hook points are attached to its model."""


class OtherModelWarning(UserWarning):
    """A dictionary was trained on a model of other weights. The message says on which."""


class PredictionWarning(UserWarning):
    """A prediction of what an edit does is worse than usual. The message says why."""


class ReaderWarning(UserWarning):
    """A reader of memories is weak, or a memory is longer than those that it was fitted to."""


class DamageWarning(UserWarning):
    """A file that an unfinished run left is damaged. It was renamed, and what it held is made again."""


def require_whole(what: str, wrong: Mapping[str, Collection[str]], fix: str) -> None:
    """Raise UnsupportedModelError where a checkpoint has faults. ``wrong`` gives the names of the tensors by fault."""
    faults = []
    for fault, names in wrong.items():
        if names:
            faults.append(f"{fault} {len(names)} tensor(s): {', '.join(sorted(names)[:3])}")
    if faults:
        raise UnsupportedModelError(f"{what}: it {'; it '.join(faults)}. {fix}")


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; nearest: a, b, c"`` for the names closest to ``name``, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; nearest: {', '.join(matches)}" if matches else ""


def with_fields(kind: Callable[..., T], fields: Mapping[str, Any]) -> T:
    """An object of a dataclass from its fields by name.

    Raises:
        ValueError: the dataclass has no such field; names the nearest.
    """
    known = [field.name for field in dataclasses.fields(cast(Any, kind))]
    for name in fields:
        if name not in known:
            raise ValueError(f"{name}: expected a field of {kind.__name__}{nearest(name, known)}")
    return kind(**fields)
