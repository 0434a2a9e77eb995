"""One way to show progress."""

from collections.abc import Iterable
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")


def bar(items: Iterable[T], name: str, progress: bool) -> Iterable[T]:
    """`items`, with a bar if `progress`; the environment variable TQDM_DISABLE=1 takes every bar away."""
    return tqdm(items, desc=name) if progress else items
