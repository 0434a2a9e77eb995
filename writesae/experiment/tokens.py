"""Texts as sequences of tokens, and tokens as text."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from hookpoints import HookedRecurrent, embedded


def text_of(file: Path | None) -> str:
    """What a text file holds; None: the held-out text of the package.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not in UTF-8.
    """
    try:
        return embedded.text("test") if file is None else file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected a text in UTF-8, got another encoding ({error}); convert it") from error


def sample_sequences(model: HookedRecurrent, text: str, context_size: int, n_sequences: int) -> Tensor:
    """[N,context_size] tokens, evenly spaced over a text (a text in order of time then gives all times).

    Raises:
        ValueError: the text is shorter than one sequence.
    """
    ids = model.to_tokens(text, prepend_bos=False, truncate=False)[0]
    n = min(n_sequences, len(ids) // context_size)
    if n == 0:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one sequence of {context_size}")
    starts = torch.linspace(0, len(ids) - context_size, n).long().tolist()
    return torch.stack([ids[start : start + context_size] for start in starts])


def token_text(model: HookedRecurrent, token: int) -> str:
    """A token as text, or its number where the model has no tokenizer."""
    return str(model.to_string(int(token))) if model.tokenizer is not None else f"#{token}"


def special_tokens(model: HookedRecurrent) -> set[int]:
    """Ids that text does not consist of: padding, begin and end."""
    ids: set[int] = set(getattr(model.tokenizer, "all_special_ids", None) or [])
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(model.hf_model.config, name, None)
        ids |= set(value) if isinstance(value, (list, tuple)) else {value} if value is not None else set()
    return ids
