"""No public call keeps an autograd graph by mistake, though the parameters require gradients: a graph holds all
activations of its pass."""

from __future__ import annotations

import gc
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from remembering import drawn_ids
from saes import HEAD, HOOK, LAYER, random_sae
from tiny_models import make_hf
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import hookpoints
import sae_lens_writesae
import writesae
from hookpoints import EditSession, HookedRecurrent, Memory, MemoryReader, WriteEdit, attach
from sae_lens_writesae import HookedSAERecurrent
from writesae.experiment.lab import Lab

TOKENS = drawn_ids(6, 24, seed=0)
MORE = TOKENS[:, :8]
DELETE = WriteEdit(LAYER, HEAD, 5, mode="delete")
HEAD_ARGUMENTS: dict[str, Any] = {"layer": LAYER, "head": HEAD}


@dataclass
class World:
    """What calls are made on."""

    model: HookedSAERecurrent
    sae: Any
    folder: Path

    def folder_of(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder)) / name


def metric(logits: Tensor) -> Tensor:
    return logits[0, -1].log_softmax(-1)[3]


def saved(world: World) -> Memory:
    file = world.folder_of("memory")
    world.model.memory(TOKENS).save(file)
    return Memory.load(file, world.model)


def recorded(world: World) -> Any:
    with world.model.recording() as record:
        world.model(TOKENS)
    return record


def fitted(world: World) -> Any:
    reader = MemoryReader.fit(world.model, drawn_ids(1200), lead=[3], longest=4, context=24)
    memory = world.model.memory(TOKENS)
    read = reader.read_back(memory, 2, length=3, beam=4)
    return reader, reader.scores(memory, [[1, 2]]), torch.tensor([phrase.tokens for phrase in read]), reader.fitted


def forgotten(world: World) -> Any:
    memory = world.model.memory(TOKENS[:1])
    return hookpoints.forgot(memory, memory.without((3, 6)), (3, 6), candidates=[[1, 2], [3]])


def attached(world: World) -> Any:
    with attach(make_hf()) as hooked:
        return hooked.recurrence(TOKENS, LAYER)


def collected(world: World) -> sae_lens_writesae.Collection:
    return sae_lens_writesae.collect(world.model, TOKENS, [LAYER], [HEAD], world.folder_of("text"), progress=False)


def configured(world: World) -> Any:
    sizes: dict[str, Any] = {"d_sae": 8, "sae": {"k": 2}, "training_tokens": 128, "train_batch_size_tokens": 32}
    return sae_lens_writesae.training_config(collected(world), **HEAD_ARGUMENTS, **sizes)


def steered(world: World) -> Any:
    steering = sae_lens_writesae.steer(world.model, **HEAD_ARGUMENTS, toward=3)
    with steering, torch.no_grad():
        world.model(TOKENS)
    return steering


def scaled(world: World) -> Any:
    scaling = sae_lens_writesae.scale_atoms(world.model, world.sae, [0, 1], 2.0)
    with scaling, torch.no_grad():
        world.model(TOKENS)
    return scaling


def of_facts(text: str) -> Memory:
    return HookedRecurrent.from_pretrained("facts").memory(text)


CALLS: dict[str, Callable[[World], Any]] = {
    "HookedRecurrent.from_hf": lambda w: HookedSAERecurrent.from_hf(make_hf()),
    "HookedRecurrent.generate": lambda w: w.model.generate(MORE, max_new_tokens=2, do_sample=False, edits=DELETE),
    "HookedRecurrent.memory": lambda w: w.model.memory(MORE, memory=w.model.memory(TOKENS)),
    "HookedRecurrent.logits_after": lambda w: w.model.logits_after(w.model.memory(TOKENS), MORE),
    "HookedRecurrent.recurrence": lambda w: w.model.recurrence(TOKENS, LAYER),
    "HookedRecurrent.recording": recorded,
    "HookedRecurrent.run_with_cache (cache)": lambda w: w.model.run_with_cache(TOKENS)[1],
    "HookedRecurrent.run_with_cache_with_saes (cache)": lambda w: w.model.run_with_cache_with_saes(
        TOKENS, saes=[w.sae]
    )[1],
    "HookedRecurrent.run_with_edits": lambda w: w.model.run_with_edits(TOKENS[:1], [DELETE, []]),
    "EditSession.run_hooked": lambda w: EditSession(w.model, TOKENS[:1]).run_hooked(
        2, LAYER, 5, [(HOOK, lambda x, hook: x)]
    ),
    "Memory.without": lambda w: w.model.memory(TOKENS).without((3, 6)),
    "Memory.held": lambda w: of_facts("Ben lives in Rome .").held(2),
    "Memory.suspects": lambda w: of_facts("Ben lives in Rome . Iris keeps a parrot .").suspects("Ben"),
    "Memory.told": lambda w: w.model.memory(TOKENS).told([3, 4], instead_of=slice(5, 6)),
    "forgot": forgotten,
    "MemoryReader": fitted,
    "Memory.rewind": lambda w: w.model.memory(TOKENS).rewind(5),
    "Memory.paste": lambda w: w.model.memory(TOKENS).paste(w.model.memory(TOKENS), (0, 3)),
    "Memory.holdings": lambda w: w.model.memory(TOKENS).holdings(0),
    "Memory.terms": lambda w: w.model.memory(TOKENS).terms(0),
    "Memory.load": saved,
    "attach": attached,
    "as_bridge": lambda w: hookpoints.as_bridge(w.model),
    "write_attribution": lambda w: hookpoints.write_attribution(w.model, TOKENS[:1], metric),
    "attribute": lambda w: hookpoints.attribute(TOKENS[:1], w.model, [3], measure=3, targets=1),
    "attribute_task": lambda w: hookpoints.attribute_task([(TOKENS[:1], TOKENS[1:2], 3, 4)], w.model, measure=3),
    "collect": collected,
    "fit_metrics": lambda w: sae_lens_writesae.fit_metrics(w.model, TOKENS, [(LAYER, HEAD)]),
    "train": lambda w: sae_lens_writesae.train(configured(w)),
    "steer": steered,
    "scale_atoms": scaled,
    "Lab.firings": lambda w: Lab(w.model, {"": w.sae}, TOKENS).firings(),
    "Lab.native_writes": lambda w: Lab(w.model, {"": w.sae}, TOKENS).native_writes([0, 1]),
    "dictionary_quality": lambda w: writesae.dictionary_quality(w.model, w.sae, TOKENS),
    "head_effects": lambda w: writesae.head_effects(w.model, TOKENS),
}
"""Public calls that run a model."""

BACKWARD = {
    *("attribute", "attribute_task", "write_attribution", "fit_metrics", "train", "MemoryReader"),
    *("HookedRecurrent.recording", "HookedRecurrent.run_with_cache (cache)"),
    "HookedRecurrent.run_with_cache_with_saes (cache)",
}
"""Those that run a backward pass themselves, or return logits beside what they keep. The others build no graph."""

DIFFERENTIABLE: dict[str, Callable[[World], Any]] = {
    "HookedRecurrent.forward": lambda w: w.model(TOKENS),
    "HookedRecurrent.run_with_hooks": lambda w: w.model.run_with_hooks(TOKENS, fwd_hooks=[(HOOK, lambda x, hook: x)]),
    "HookedRecurrent.run_with_cache_with_saes": lambda w: w.model.run_with_cache_with_saes(TOKENS, saes=[w.sae]),
    "HookedRecurrent.logits_after (gradients)": lambda w: w.model.logits_after(
        w.model.memory(TOKENS), MORE, gradients=True
    ),
    "HookedRecurrent.recurrence (gradients)": lambda w: w.model.recurrence(TOKENS, LAYER, gradients=True),
    "HookedRecurrent.run_with_edits (gradients)": lambda w: w.model.run_with_edits(
        TOKENS[:1], [DELETE], gradients=True
    ),
}
"""Calls whose purpose is gradients, or whose logits have one, as those of any torch model."""


class Saved:
    """A tensor that a graph holds for its backward pass."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor.detach()


def graph_bytes(call: Callable[[], Any], parameters: Iterator[Tensor]) -> tuple[int, int, Any]:
    """Bytes that autograd graphs still hold after a call, while its value lives, without the model's parameters; how
    many tensors were saved for a backward pass meanwhile; and the value."""
    living: weakref.WeakSet[Saved] = weakref.WeakSet()
    count = 0

    def keep(tensor: Tensor) -> Saved:
        nonlocal count
        count += 1
        living.add(kept := Saved(tensor))
        return kept

    with saved_tensors_hooks(keep, lambda kept: kept.tensor):
        value = call()
    gc.collect()
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in (each.tensor for each in living)}
    for parameter in parameters:
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storages.values()), count, value


def tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Tensors inside of a value."""
    if id(value) in seen or isinstance(value, (str, nn.Module)):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors(each, seen)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors(each, seen)
    elif hasattr(value, "__dict__"):
        yield from tensors(vars(value), seen)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    model = HookedSAERecurrent.from_hf(make_hf(), trainable=True)
    assert all(parameter.requires_grad for parameter in model.parameters())
    return World(model, random_sae(model), tmp_path_factory.mktemp("graphs"))


@pytest.mark.parametrize("name", CALLS)
def test_a_call_keeps_no_graph(world: World, name: str) -> None:
    size, count, value = graph_bytes(lambda: CALLS[name](world), world.model.parameters())
    assert count == 0 or name in BACKWARD, f"{name} builds graphs that nothing uses: {count} tensors"
    with_graph = [list(x.shape) for x in tensors(value, set()) if x.grad_fn is not None]
    assert not with_graph and size == 0, f"{name}: {size} bytes in graphs"


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_what_is_for_gradients_has_them(world: World, name: str) -> None:
    size, _, value = graph_bytes(lambda: DIFFERENTIABLE[name](world), world.model.parameters())
    assert size > 0 and any(x.grad_fn is not None for x in tensors(value, set()))
