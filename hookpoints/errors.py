"""Errors of hookpoints. Each says what was asked, what was found and how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HookpointsError(Exception):
    """Base of every error that hookpoints raises on its own account."""


class UnknownHookError(HookpointsError, KeyError):
    """A hook name that this model does not have."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


class HookDidNotFireError(HookpointsError, RuntimeError):
    """A hook (or an edit) was set, the model ran, and it never acted."""


class HookShapeError(HookpointsError, ValueError):
    """A hook returned something that cannot stand in for the activation."""


class UnsupportedModelError(HookpointsError, ValueError):
    """A model whose recurrence cannot be hooked."""


class SelfCheckError(HookpointsError, RuntimeError):
    """The model does not behave as the hooks need; it is refused rather than hooked wrongly."""


class EditError(HookpointsError, ValueError):
    """A WriteEdit that does not fit the model or the tokens."""


class InputError(HookpointsError, ValueError):
    """Token ids or an attention mask that the model cannot take."""


class Float16OverflowError(HookpointsError, FloatingPointError):
    """Reads, state or output of a layer with hooks or edits are beyond float16's range."""


class BridgeWarning(UserWarning):
    """A TransformerBridge does not compute what its own Hugging Face model does, or not all of its hooks fire."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """``"; nearest: a, b"`` for the names closest to ``name``, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f"; nearest: {', '.join(matches)}" if matches else ""
