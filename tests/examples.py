"""Code that readers are shown, run as in a fresh start: a namespace of its own, a folder, settings put back."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import torch

FIRST_SEED = 67280421310721
"""The seed of torch's generator in a new process."""


@contextlib.contextmanager
def fresh_start(folder: Path):
    """A folder, torch's first seed, no filters of warnings. What an example sets is put back."""
    logger = logging.getLogger("sae_lens")
    level = logger.level
    with (
        contextlib.chdir(folder),
        warnings.catch_warnings(),
        torch.enable_grad(),
        torch.random.fork_rng(devices=[]),
    ):
        warnings.simplefilter("ignore")
        torch.manual_seed(FIRST_SEED)
        try:
            yield
        finally:
            logger.setLevel(level)


def printed(code: str, name: str, namespace: dict[str, Any] | None = None) -> str:
    """What code prints; `name` stands in tracebacks."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        exec(compile(code, name, "exec"), {"__name__": "__main__"} if namespace is None else namespace)
    return said.getvalue()
