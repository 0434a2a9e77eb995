"""Where a pass begins: how many tokens its cache holds."""

from __future__ import annotations

from transformers import Cache

_TOKENS = "_hookpoints_tokens"
"""Attribute on caches of recurrent layers alone. They hold no length, so hooked layers count there; deep copies of a
cache take the count with them."""


def position_of(cache: Cache | None) -> int | None:
    """Number of tokens in ``cache``, which is the position of the next one; None where nothing tells.

    It must be read before any layer runs: attention layers advance a cache during the pass.
    """
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except ValueError:  # only linear layers, which hold no length
        counted = getattr(cache, _TOKENS, None)
        return counted if isinstance(counted, int) else None if cache.has_previous_state() else 0


def count_tokens(cache: Cache, tokens: int) -> None:
    """Note that a pass fills ``cache`` up to ``tokens``."""
    setattr(cache, _TOKENS, tokens)


def cache_among(*values: object) -> Cache | None:
    """The cache among a module's arguments. Its name differs between versions of transformers, its type does not."""
    return next((value for value in values if isinstance(value, Cache)), None)
