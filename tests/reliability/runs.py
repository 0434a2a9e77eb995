"""Every kind of run of a hooked model, for interrupts, threads and what is left behind."""

from __future__ import annotations

from collections.abc import Callable

import torch
from conftest import make_hf

from hookpoints import HookedRecurrent, WriteEdit

WRITE = "blocks.1.mixer.hook_write"
EDITS = [WriteEdit(1, 0, 5, mode="delete"), WriteEdit(0, 2, None, torch.ones(8), torch.ones(6))]


def fresh():
    return HookedRecurrent.from_hf(make_hf())


def some_tokens():
    return torch.randint(1, 64, (2, 70), generator=torch.Generator().manual_seed(1))


def doubled(write, hook):
    return 2 * write


def native(model, tokens):
    return model.hf_model(tokens).logits


def cached(model, tokens):
    return model.run_with_cache(tokens, names_filter=[WRITE, "blocks.0.hook_resid_pre"])[1][WRITE]


def hooked(model, tokens):
    return model.run_with_hooks(tokens, fwd_hooks=[(WRITE, doubled), ("blocks.0.mixer.hook_k", doubled)])


def generated(model, tokens):
    return model.generate(tokens[:, :12], edits=EDITS, max_new_tokens=4, do_sample=False)


def nested(model, tokens):
    with model.edits(EDITS[0]), model.hooks([(WRITE, doubled)]), model.edits(EDITS[1]):
        return model(tokens)


def partial(model, tokens):
    return model(model(tokens, stop_at_layer=1), start_at_layer=1, stop_at_layer=3)


def session(model, tokens):
    return model.run_with_edits(tokens[:1], EDITS).logits


RUNS: list[Callable] = [nested, native, cached, hooked, generated, partial, session]


@torch.no_grad()
def outputs(model, tokens) -> dict[str, torch.Tensor]:
    """What a model computes in each kind of run."""
    return {run.__name__: run(model, tokens) for run in RUNS}
