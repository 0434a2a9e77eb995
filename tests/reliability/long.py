"""Long sequences: generation, and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from transformers import Cache

from hookpoints import HookedRecurrent, WriteEdit
from hookpoints.model.inputs import cache_of
from reliability.checks import ACTIVE, Change, Comparison, Most, breaking, check

LAYER, HEAD = 2, 1


def _tokens(model: HookedRecurrent, length: int) -> torch.Tensor:
    return torch.randint(1, model.cfg.d_vocab, (1, length), generator=torch.Generator().manual_seed(0))


def _states(cache: Cache) -> list[torch.Tensor]:
    """Every recurrent state of a cache, and the keys of attention."""
    found = []
    for layer in cache.layers:
        states = getattr(layer, "recurrent_states", None)
        many = list(states.values()) if isinstance(states, dict) else states if isinstance(states, list) else [states]
        found += [each for each in (*many, getattr(layer, "keys", None)) if isinstance(each, torch.Tensor)]
    return found


@check(
    "Long sequences",
    {
        "all generated tokens have one position": [
            Change(
                "hookpoints.layer.context:position_of", "int(cache.get_seq_length())", "cache.get_seq_length() and 20"
            )
        ]
    },
    few=24,
    many=200,
)
@torch.no_grad()
def generation(work, rounds):
    """Tokens generated with a hook are compared with those of the model alone. With edits, at every position and at one
    that is generated, states of the cache that generation left are compared with those of one pass (their largest
    relative error)."""
    model = HookedRecurrent.from_pretrained("embedded")
    prompt, seen = _tokens(model, 16), []
    how = {"max_new_tokens": rounds, "min_new_tokens": rounds, "do_sample": False}
    with model.hooks([(f"blocks.{LAYER}.mixer.hook_write", lambda write, hook: seen.append(write.shape[1]))]):
        watched = model.generate(prompt, **how)
    alone = model.hf_model.generate(prompt, **how)
    yield Comparison("tokens", alone, watched)
    yield Comparison("tokens that the hook was given", alone.shape[1] - 1, sum(seen))
    edits = [WriteEdit(LAYER, HEAD, None, mode="delete"), WriteEdit(LAYER, 0, 20, torch.ones(64), torch.ones(32))]
    kept = model.generate(prompt, edits=edits, return_dict_in_generate=True, **how)
    with model.edits(edits):
        whole = model.hf_model(kept.sequences[:, :-1], use_cache=True)
    for expected, got in zip(_states(cache_of(whole)), _states(cache_of(kept)), strict=True):
        error = float((expected - got).abs().max() / expected.abs().max())
        yield Comparison("largest relative error of a state", Most(1e-4), error)


PEAKS = {"no hooks": 1.1, "a cached read": 1.3, "an edit session": 3.0, "run_with_edits": 4.0}
"""What is run, and the most memory that it may take, in multiples of what the model without hookpoints takes."""


def _memory(name: str) -> int:
    """In kB. Not ``ru_maxrss``, which a process inherits from the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


@torch.no_grad()
def _peak(kind: str, length: int) -> int:
    """Memory in kB that one pass over ``length`` tokens adds to this process, at its highest."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of a length that attention was not trained for
    model = HookedRecurrent.from_pretrained("embedded")
    tokens = _tokens(model, length)
    model.run_with_edits(tokens[:, :70], [WriteEdit(LAYER, HEAD, 40, mode="delete")])
    if kind == "plain":
        model.attachment.detach()
    before = _memory("VmRSS")
    if kind == "plain":
        model.hf_model(tokens, use_cache=False)
    elif kind == "no hooks":
        model(tokens)
    elif kind == "a cached read":
        model.run_with_cache(tokens, names_filter=f"blocks.{LAYER}.mixer.hook_read")
    else:
        session = model.edit_session(tokens)
        if kind == "run_with_edits":
            session.run([WriteEdit(LAYER, HEAD, 40, mode="delete")])
    return _memory("VmHWM") - before


@check(
    "Long sequences",
    {
        "outputs of all modules stay in memory": [
            Change(
                "hookpoints.layer.intercept:_WrappedForward.__call__",
                "return forward(*args, **kwargs)",
                "return self.__dict__.setdefault('all', []).append(x := forward(*args, **kwargs)) or x",
            )
        ]
    },
    few=2048,
    many=8192,
    slow=True,
)
def memory(work, rounds):
    """Memory that one pass over a long sequence adds, at its highest, each in a process of its own. It is compared with
    a bound, in multiples of what the model without hookpoints takes."""

    def peak(kind: str) -> int:
        command = [sys.executable, "-m", "reliability.long", kind, str(rounds), json.dumps(ACTIVE)]
        # Not in `tests`, whose folder `hookpoints` would be taken for the package.
        root, tests = Path(__file__).parents[2], Path(__file__).parents[1]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(tests)])}
        return int(subprocess.run(command, check=True, capture_output=True, cwd=root, env=environment).stdout)

    plain = peak("plain")
    for kind, bound in PEAKS.items():
        yield Comparison(f"{kind}, {rounds:,} tokens", Most(bound), round(peak(kind) / plain, 2))


if __name__ == "__main__":
    with breaking([Change(*each) for each in json.loads(sys.argv[3])]):
        print(_peak(sys.argv[1], int(sys.argv[2])))
