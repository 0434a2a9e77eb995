"""Texts as sequences of tokens, and tokens as text."""

from __future__ import annotations

import lzma
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from hookpoints import HookedRecurrent, embedded
from hookpoints.scopes import threads_for
from sae_lens_writesae.sae.texts import lines_of

LAST_TEXT = Path("last")
"""Names the last text: every fourth of the Federalist Papers (1787-88), on which nothing was tuned."""


def text_of(file: Path | None) -> str:
    """The content of a text file; None: the held-out text of the package; `LAST_TEXT`: the last text.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not in UTF-8.
    """
    if file == LAST_TEXT:
        packed = Path(__file__).parents[1] / "last_text.txt.xz"
        return lzma.decompress(packed.read_bytes()).decode().replace("\f", "\n\n")
    return embedded.text("test") if file is None else "".join(lines_of(file))


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


def say_time(
    model: HookedRecurrent, tokens: Tensor, passes: float, out: Path, say: Callable[[str], object] = print
) -> None:
    """Say how long work takes that takes as long as so many passes over a sequence of `tokens`. Times a pass."""
    sample = tokens[:8]
    model(sample)  # a first pass allocates, and on a GPU compiles
    begin = time.perf_counter()
    with threads_for(0):  # as most of the work
        model(sample)
    of_a_pass = (time.perf_counter() - begin) / len(sample)
    seconds = 5 * math.ceil(passes * of_a_pass / 5)  # no more digits than the estimate has
    say(f"about {seconds} s on this machine, all stages; writes to {out}")


def token_text(model: HookedRecurrent, token: int) -> str:
    """A token as text, or its number where the model has no tokenizer."""
    return str(model.to_string(int(token))) if model.tokenizer is not None else f"#{token}"
