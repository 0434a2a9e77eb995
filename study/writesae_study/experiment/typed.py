"""Values that somebody else wrote, compared with a type."""

from __future__ import annotations

from collections.abc import Mapping
from types import UnionType
from typing import Literal, Union, cast, get_args, get_origin


def has_type(value: object, hint: object) -> bool:
    """Whether a value is of a type: of a class, literals, or unions, tuples and dicts of such. A list fits a tuple, as
    JSON has it, and a whole number fits `float`. Truth values are no numbers."""
    origin = get_origin(hint)
    inside = get_args(hint)
    if origin is Literal:
        return value in inside
    if origin in (Union, UnionType):
        return any(has_type(value, each) for each in inside)
    if origin is tuple:
        return isinstance(value, (list, tuple)) and all(has_type(entry, inside[0]) for entry in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(has_type(entry, inside[1]) for entry in value.values())
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if hint is float else cast(type, hint))
