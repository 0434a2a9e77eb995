"""Every kind of run of a hooked model, for interrupts, threads and what is left behind."""

from __future__ import annotations

from collections.abc import Callable

import torch
from remembering import drawn_ids
from tiny_models import make_hf

from hookpoints import HookedRecurrent, WriteEdit
from hookpoints import attribute as graph_of
from hookpoints import write_attribution as effects_of

WRITE = "blocks.1.mixer.hook_write"
EDITS = [WriteEdit(1, 0, 5, mode="delete"), WriteEdit(0, 2, None, torch.ones(8), torch.ones(6))]


def fresh():
    return HookedRecurrent.from_hf(make_hf())


def some_tokens():
    return drawn_ids(2, 70)


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


def remembered(model, tokens):
    before = model.memory(tokens[:, :12])
    return model.logits_after(model.memory(tokens[:, 12:20], memory=before).without((3, 6)), tokens[:, 20:24])


def told(model, tokens):
    memory = model.memory(tokens[:, :20]).told([3, 4], instead_of=slice(4, 6))
    return model.logits_after(memory, tokens[:, 20:24])


def last(logits):
    return logits[0, -1, 3]


def write_attribution(model, tokens):
    return effects_of(model, tokens[:1, :20], last)


def attribute(model, tokens):
    graph = graph_of(tokens[:1, :20], model, [3], measure=1, targets=1)
    return {"nodes": graph.nodes, "edges": graph.edges}


RUNS: list[Callable] = [nested, native, cached, hooked, generated, partial, session]
RUNS += [remembered, told, write_attribution, attribute]


PROBES: list[Callable] = [nested, cached, remembered, write_attribution]
"""Quick ones, which together meet whatever a run could leave."""


@torch.no_grad()
def outputs(model, tokens, runs=RUNS) -> dict[str, object]:
    """What a model computes in each kind of run."""
    return {run.__name__: run(model, tokens) for run in runs}
