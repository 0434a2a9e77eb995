"""A model whose layers lie on two devices gives what it gives on one, moved by hand or dispatched by accelerate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import device
import pytest
import torch
from test_on_device import PUBLIC, World, random_sae, tensors
from tiny_models import make_hf
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._pytree import tree_map

from hookpoints import HookedRecurrent, Memory, WriteEdit
from hookpoints.errors import InputError, UnsupportedModelError
from hookpoints.model import loading
from sae_lens_writesae import HookedSAERecurrent

TOKENS = torch.arange(5, 25)[None]
SPAN = (4, 8)
LAYERS = (2, 4)
"""One on each device."""


def moved_by_hand(model: Any, first: int) -> nn.Module:
    """With the blocks from ``first`` on on the device; each block, and the norm after them, takes its inputs there."""
    for number, block in enumerate(model.model.layers):
        follow(block.to("npu" if number >= first else "cpu"))
    follow(model.model.norm)
    return model


def follow(module: nn.Module) -> None:
    place = next(module.parameters()).device

    def move(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return tree_map(lambda x: x.to(place) if isinstance(x, Tensor) else x, (args, kwargs))

    module.register_forward_pre_hook(move, with_kwargs=True)


def dispatched(model: Any, first: int) -> nn.Module:
    """The same by a ``device_map`` of two devices. Without ``main_device`` all would run on the other one."""
    blocks = {f"model.layers.{number}": "npu:0" for number in range(first, len(model.model.layers))}
    others = [name for name, child in model.named_modules() if next(child.parameters(recurse=False), None) is not None]
    host = {name: "cpu" for name in others if not any(name.startswith(f"{block}.") for block in blocks)}
    main: Any = "cpu"  # which accelerate compares as a string
    places: Any = host | {"model.rotary_emb": "cpu"} | blocks
    return accelerate.dispatch_model(model, places, main_device=main)


SPREADS = [moved_by_hand, dispatched]


@pytest.fixture(scope="module", params=SPREADS, ids=lambda spread: spread.__name__)
def models(request: pytest.FixtureRequest) -> Iterator[tuple[HookedRecurrent, HookedRecurrent]]:
    """The embedded model on one device, and with blocks 3 and 4 on another."""
    with device.pretended():
        one = HookedRecurrent.from_pretrained("embedded", device="cpu")
        hf_model = loading.load("embedded", device="cpu").model
        two = HookedRecurrent.from_hf(request.param(hf_model, 3), name="embedded")
        assert {str(parameter.device) for parameter in two.parameters()} == {"cpu", "npu:0"}
        yield one, two


def delete(layer: int) -> WriteEdit:
    return WriteEdit(layer, 1, 5, mode="delete")


def add(layer: int) -> WriteEdit:
    drawn = torch.Generator().manual_seed(0)
    key, value = (torch.randn(size, generator=drawn) for size in (64, 32))
    return WriteEdit(layer, 1, 5, mode="add", keys=key, values=value)


def read(layer: int) -> Callable[[HookedRecurrent], Tensor]:
    name = f"blocks.{layer}.mixer.heads.1.hook_write"
    return lambda model: model.run_with_cache(TOKENS, names_filter=name)[1][name]


def edited(edit: WriteEdit) -> Callable[[HookedRecurrent], Tensor]:
    return lambda model: model.run_with_edits(TOKENS, [edit]).logits


def edited_in_place(edit: WriteEdit) -> Callable[[HookedRecurrent], Tensor]:
    def run(model: HookedRecurrent) -> Tensor:
        with model.edits(edit):
            return model(TOKENS)

    return run


def cut(change: Callable[[Memory], Memory]) -> Callable[[HookedRecurrent], Tensor]:
    """All states after a change of a memory, and what is read on from there."""

    def run(model: HookedRecurrent) -> Tensor:
        memory = change(model.memory(TOKENS))
        states = [memory.state(layer).cpu().flatten() for layer in LAYERS]
        return torch.cat([*states, model.logits_after(memory, TOKENS).cpu().flatten()])

    return run


def loaded(memory: Memory, folder: Path) -> Memory:
    memory.save(folder / "memory")
    return Memory.load(folder / "memory", memory.model)


CALLS: dict[str, Callable[[HookedRecurrent], Tensor]] = {
    "logits": lambda model: model(TOKENS),
    "generate": lambda model: model.generate(TOKENS, max_new_tokens=4, do_sample=False),
    "session": lambda model: model.run_with_edits(TOKENS, [[delete(2), add(4)], [delete(4)], []]).logits,
    "memory": cut(lambda memory: memory),
    "without": cut(lambda memory: memory.without(SPAN)),
    "paste": cut(lambda memory: memory.paste(memory, SPAN)),
    "rewind": cut(lambda memory: memory.rewind(7)),
    "truncate": cut(lambda memory: memory.truncate(3)),
    **{f"read {layer}": read(layer) for layer in LAYERS},
    **{f"delete {layer}": edited_in_place(delete(layer)) for layer in LAYERS},
    **{f"add {layer}": edited_in_place(add(layer)) for layer in LAYERS},
    **{f"recurrence {layer}": lambda model, layer=layer: model.recurrence(TOKENS, layer).k for layer in LAYERS},
    **{f"holdings {layer}": lambda model, layer=layer: model.memory(TOKENS).holdings(layer) for layer in LAYERS},
}


@pytest.mark.parametrize("name", CALLS)
@torch.no_grad()
def test_two_devices_give_what_one_gives(models: tuple[HookedRecurrent, HookedRecurrent], name: str) -> None:
    expected, got = (CALLS[name](model).cpu() for model in models)
    assert_close(got, expected, rtol=0, atol=5e-5)
    if name.startswith(("delete", "add")):
        assert (got - models[0](TOKENS)).abs().max() > 1e-3


def test_a_memory_is_saved_and_cut_on_both(models: tuple[HookedRecurrent, HookedRecurrent], tmp_path: Path) -> None:
    expected, got = (cut(lambda memory: loaded(memory, tmp_path).without(SPAN))(model) for model in models)
    assert_close(got, expected, rtol=0, atol=5e-5)


def test_a_state_of_the_other_device_is_refused(models: tuple[HookedRecurrent, HookedRecurrent]) -> None:
    memory = models[1].memory(TOKENS)
    with pytest.raises(InputError, match=r"layer 4: expected .*npu.* got .*cpu"):
        memory.with_states({4: memory.state(4).cpu()})


@pytest.fixture(scope="module", params=SPREADS, ids=lambda spread: spread.__name__)
def worlds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, World]]:
    """Tiny models with attention in the last layer, and a dictionary where its head is."""
    with device.pretended():
        models = [HookedSAERecurrent.from_hf(model) for model in (make_hf(), request.param(make_hf(), 1))]
        folder = tmp_path_factory.mktemp("worlds")
        one, two = (World(model, random_sae(model), folder) for model in models)
        two.sae.to("npu")
        yield one, two


LONG = ("train", "Substitution", "head_effects", "dictionary_quality")
REFUSED = ("attribute",)


@pytest.mark.parametrize("name", [name for name in PUBLIC if name not in LONG + REFUSED])
def test_public_calls(worlds: tuple[World, World], name: str) -> None:
    expected, got = (tensors(PUBLIC[name](world)) for world in worlds)
    assert len(got) == len(expected)
    for one, other in zip(got, expected):
        assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_calls_of_one_device(worlds: tuple[World, World], name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="expected a model on one device, got one on cpu, npu:0"):
        PUBLIC[name](worlds[1])


def test_a_dictionary_of_the_other_device_is_refused(worlds: tuple[World, World]) -> None:
    """SAELens attaches it, and its first pass fails in the middle of the layer."""
    model = worlds[1].model
    with pytest.raises(ValueError, match=r"expected one on npu:0, as blocks\.1\..*, got one on cpu; move it: sae\.to"):
        model.run_with_saes(TOKENS, saes=[random_sae(model)])
    assert not model.acts_to_saes
    assert [str(model.hook_device(f"blocks.{layer}.hook_resid_pre")) for layer in range(2)] == ["cpu", "npu:0"]
