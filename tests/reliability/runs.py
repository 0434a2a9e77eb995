"""Every kind of run of a hooked model, for interrupts, threads and what is left behind."""

from __future__ import annotations

from collections.abc import Callable

import torch
from remembering import drawn_ids
from sae_lens.saes.sae import SAEMetadata
from tiny_models import make_hf

from hookpoints import HookedRecurrent, WriteEdit
from hookpoints import attribute as graph_of
from hookpoints import write_attribution as effects_of
from sae_lens_writesae.sae import WriteProductSAE, WriteProductSAEConfig

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


def pairs() -> WriteProductSAE:
    """A dictionary of the states of one head, with words: five drawn keys and four drawn values."""
    words = {"keys": [f"key {n}" for n in range(5)], "values": [f"value {n}" for n in range(4)]}
    sizes = {"d_in": 48, "d_k": 8, "d_sae": 20, "f_key": 5, "f_value": 4}
    metadata = SAEMetadata(hook_name="blocks.1.mixer.heads.1.hook_state_vec")
    metadata.labels = {
        side: {"words": names, "correlations": [1.0] * len(names), "sizes": [1.0] * len(names)}
        for side, names in words.items()
    }
    sae = WriteProductSAE(WriteProductSAEConfig(**sizes, encoder="pursuit", metadata=metadata))
    drawn = torch.Generator().manual_seed(4)
    with torch.no_grad():
        sae.key_atoms.copy_(torch.randn(5, 8, generator=drawn))
        sae.value_atoms.copy_(torch.randn(4, 6, generator=drawn))
    return sae


PAIRS = pairs()


def remembered(model, tokens):
    before = model.memory(tokens[:, :12])
    return model.logits_after(model.memory(tokens[:, 12:20], memory=before).without((3, 6)), tokens[:, 20:24])


def facts(model, tokens):
    return model.memory(tokens[:, :20]).facts(PAIRS, n=3)


def with_fact(model, tokens):
    memory = model.memory(tokens[:, :20]).with_fact(PAIRS, "key 1", "value 2")
    return model.logits_after(memory, tokens[:, 20:24])


def last(logits):
    return logits[0, -1, 3]


def write_attribution(model, tokens):
    return effects_of(model, tokens[:1, :20], last)


def attribute(model, tokens):
    graph = graph_of(tokens[:1, :20], model, [3], measure=1, targets=1)
    return {"nodes": graph.nodes, "edges": graph.edges}


RUNS: list[Callable] = [nested, native, cached, hooked, generated, partial, session]
RUNS += [remembered, facts, with_fact, write_attribution, attribute]


PROBES: list[Callable] = [nested, cached, facts, write_attribution]
"""Quick ones, which together meet whatever a run could leave."""


@torch.no_grad()
def outputs(model, tokens, wanted=RUNS) -> dict[str, object]:
    """What a model computes in each kind of run."""
    return {run.__name__: run(model, tokens) for run in wanted}
