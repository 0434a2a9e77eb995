"""Long sequences: generation."""

from __future__ import annotations

import torch
from transformers import Cache

from hookpoints import HookedRecurrent, WriteEdit
from hookpoints.model.inputs import cache_of
from reliability.checks import Change, Comparison, Most, check

LAYER, HEAD = 2, 1


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
    prompt, seen = torch.randint(1, model.cfg.d_vocab, (1, 16), generator=torch.Generator().manual_seed(0)), []
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
