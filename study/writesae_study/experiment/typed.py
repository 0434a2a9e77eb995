"""Settings that somebody else wrote, compared with their types and bounds by pydantic."""

from __future__ import annotations

import json
from typing import Any

from pydantic import TypeAdapter, ValidationError


def checked_setting(name: str, value: object, hint: Any) -> object:
    """A setting as its type has it: a list becomes a tuple.

    Raises:
        ValueError: the value is of another type or out of its bounds; names the setting.
    """
    try:
        # By the rules of JSON: a list fits a tuple and a whole number a float, and nothing else is converted.
        return TypeAdapter(hint).validate_json(json.dumps(value, default=repr), strict=True)
    except ValidationError as error:
        expected = error.errors()[0]["msg"].replace("Input should be", "expected")
        raise ValueError(f"{name}: {expected}, got {value!r}") from None
