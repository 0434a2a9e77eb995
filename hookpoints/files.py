"""Files that someone else may have written: what they hold is data, and may be damaged or made to do harm."""

from __future__ import annotations

import json
from pathlib import Path

LARGEST_JSON = 64 * 10**6
"""Bytes of a JSON file that are read. Largest are tokenizers and indices of weights, some 35 MB; in memory it may take
twenty times as much."""


def check_json_size(file: Path, most: int = LARGEST_JSON) -> None:
    """Raise ValueError, naming the file, where it has more than ``most`` bytes. Nothing is read."""
    size = file.stat().st_size
    if size > most:
        raise ValueError(f"{file} has {size / 1e6:,.0f} MB, and {most / 1e6:,.0f} MB of JSON at most are read")


def read_json(file: Path) -> dict[str, object]:
    """The object of names and values that a JSON file holds.

    Raises:
        ValueError: it is too large, cut short, nested too deeply, or holds something else; names the file.
        OSError: it cannot be read.
    """
    check_json_size(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{file} is nested too deeply for JSON that is read") from error
    except ValueError as error:
        raise ValueError(f"{file} is cut short, or is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {type(content).__name__}, not an object of names and values")
    return content
