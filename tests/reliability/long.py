"""Long runs: memory over many runs, peak memory of long sequences, caches after thousands of generated tokens."""

from __future__ import annotations

import gc
import multiprocessing
import resource
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import Cache

from hookpoints import HookedRecurrent, WriteEdit
from hookpoints.model.inputs import cache_of

LAYER, HEAD = 2, 1
MEGABYTE = 2**20


def resident() -> float:
    """Memory of this process in MB, without what could be collected."""
    gc.collect()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise OSError("no VmRSS")


def _tokens(model: HookedRecurrent, length: int) -> torch.Tensor:
    return torch.randint(1, model.cfg.d_vocab, (1, length), generator=torch.Generator().manual_seed(0))


def cached_runs(model: HookedRecurrent, tokens: torch.Tensor) -> None:
    names = [f"blocks.{LAYER}.mixer.hook_write", f"blocks.{LAYER}.hook_resid_pre"]
    model.run_with_cache(tokens, names_filter=names)


def sessions(model: HookedRecurrent, tokens: torch.Tensor) -> None:
    model.run_with_edits(tokens, [WriteEdit(LAYER, head, 40, mode="delete") for head in range(2)])


class Growth(NamedTuple):
    """Memory in MB after a warm-up of as many runs as a tenth, and after all of them."""

    before: float
    after: float
    hooks: int
    """Hooks left on the model."""


def growth(run: Callable[[HookedRecurrent, torch.Tensor], None], n: int) -> Growth:
    """Repeat a run."""
    model = HookedRecurrent.from_pretrained("embedded")
    tokens = _tokens(model, 64)
    for _ in range(max(n // 10, 5)):
        run(model, tokens)
    before = resident()
    for _ in range(n):
        run(model, tokens)
    hooks = sum(len(point.fwd_hooks) + len(point._forward_hooks) for point in model.hook_dict.values())
    return Growth(before, resident(), hooks)


PEAKS = ("plain", "hooked", "cached", "edited")
"""The model without hookpoints; with it and nobody listening; with the reads of a layer kept; with an edit."""


def peak(kind: str, length: int) -> float:
    """Memory in MB that one pass over ``length`` tokens adds to a process, at its highest."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (kind, length))


def _peak(kind: str, length: int) -> float:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of a length that attention was not trained for
    model = HookedRecurrent.from_pretrained("embedded")
    tokens, plain = _tokens(model, length), model.hf_model
    if kind == "plain":
        model.attachment.detach()
    with torch.no_grad():
        plain(tokens[:, :8])
        before = resident()
        if kind == "plain":
            plain(tokens, use_cache=False)
        elif kind == "hooked":
            model(tokens)
        elif kind == "cached":
            model.run_with_cache(tokens, names_filter=f"blocks.{LAYER}.mixer.hook_read")
        else:
            with model.edits(WriteEdit(LAYER, HEAD, 40, mode="delete")):
                model(tokens)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before


class Generation(NamedTuple):
    """What generation with hooks and an edit left, against the same by hand."""

    tokens: int
    same_tokens: bool
    """Whether they are those that the model generates alone, where hooks only look."""
    fired: int
    """Calls of the hook."""
    state_error: float
    """Largest difference of the states of the cache that generation left from those of one pass over all tokens,
    relative to the largest state."""


def _states(cache: Cache) -> list[torch.Tensor]:
    """Every recurrent state of a cache, and what attention keeps."""
    found = []
    for layer in cache.layers:
        states = getattr(layer, "recurrent_states", None)
        many = list(states.values()) if isinstance(states, dict) else states if isinstance(states, list) else [states]
        found += [each for each in (*many, getattr(layer, "keys", None)) if isinstance(each, torch.Tensor)]
    return found


def generation(n: int) -> Generation:
    """Generate ``n`` tokens with a hook and an edit in force; then compare the cache with one pass over all of them."""
    model = HookedRecurrent.from_pretrained("embedded")
    prompt, calls = _tokens(model, 16), []
    how = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False}
    look = [(f"blocks.{LAYER}.mixer.hook_write", lambda write, hook: calls.append(1))]
    with model.hooks(look):
        watched = model.generate(prompt, **how)
    alone = model.hf_model.generate(prompt, **how)
    edit = WriteEdit(LAYER, HEAD, None, mode="delete")
    kept = model.generate(prompt, edits=edit, return_dict_in_generate=True, **how)
    tokens, cache = kept.sequences, cache_of(kept)
    with torch.no_grad(), model.edits(edit):
        whole = model.hf_model(tokens[:, :-1], use_cache=True)
    pairs = zip(_states(cache), _states(cache_of(whole)), strict=True)
    error = max(float((left - right).abs().max() / right.abs().max()) for left, right in pairs)
    return Generation(n, torch.equal(watched, alone), len(calls), error)
