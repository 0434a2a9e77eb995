"""A layer to which nobody listens is left alone, and every way to attach to a hook point ends that."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import make_hf
from transformer_lens.hook_points import HookPoint

from hookpoints import HookedRecurrent
from hookpoints.layer import call

NAME = "blocks.1.mixer.heads.2.hook_write"


def zeroed(x: torch.Tensor, hook: object = None) -> torch.Tensor:
    return 0 * x


class Zeroing(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0 * x


WAYS: dict[str, Callable[[HookedRecurrent, HookPoint], object]] = {
    "model": lambda model, point: model.add_hook(NAME, zeroed),
    "permanent": lambda model, point: model.add_perma_hook(NAME, zeroed),
    "point": lambda model, point: point.add_hook(zeroed, prepend=True),
    "torch": lambda model, point: point.register_forward_hook(lambda module, args, output: 0 * output),
    "torch, before": lambda model, point: point.register_forward_pre_hook(lambda module, args: (0 * args[0],)),
    "module": lambda model, point: setattr(model.blocks[1].mixer.heads[2], "hook_write", Zeroing()),
}


@pytest.fixture
def handled(monkeypatch) -> list[int]:
    """The layers whose calls were handled, in order."""
    seen, plain = [], call.running
    noted = lambda handler, *args: seen.append(handler.mixer.layer) or plain(handler, *args)  # noqa: E731
    monkeypatch.setattr(call, "running", noted)
    return seen


@pytest.fixture
def quiet() -> HookedRecurrent:
    """A model of its own that has run, so that its layers know that nobody listens."""
    model = HookedRecurrent.from_hf(make_hf(), self_check=False)
    model(torch.arange(9).unsqueeze(0))
    return model


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_every_way_to_attach_is_seen(quiet, tokens, handled, way):
    plain = quiet(tokens)
    assert not handled
    WAYS[way](quiet, quiet.hook_dict[NAME])
    changed = quiet(tokens)
    assert handled == [1] and not torch.equal(changed, plain)


@pytest.mark.parametrize("way", ["full", "before"])
def test_backward_hooks_of_torch_are_seen(quiet, tokens, way):
    point, seen = quiet.hook_dict[NAME], []
    register = point.register_full_backward_hook if way == "full" else point.register_full_backward_pre_hook
    register(lambda *args: seen.append(args))
    quiet(tokens).sum().backward()
    assert len(seen) == 1


@torch.no_grad()
def test_a_layer_is_left_alone_again_when_its_hooks_are_gone(quiet, tokens, handled):
    """Also after an error, and when handles are taken off one by one; other layers are never met. Hooks of closed
    scopes are not counted among those of a point."""
    with pytest.raises(ZeroDivisionError), quiet.hooks([(NAME, lambda x, hook: 1 / 0)]):
        quiet(tokens)
    quiet.add_hook(NAME, zeroed)
    quiet.hook_dict[NAME].fwd_hooks.pop().hook.remove()
    quiet.hook_dict[NAME].add_hook(zeroed)
    quiet.hook_dict[NAME].remove_hooks()
    assert handled == [1]
    plain = quiet(tokens)
    quiet.generate(tokens[:1, :5], max_new_tokens=3, do_sample=False)
    assert handled == [1]
    quiet.hook_dict[NAME].add_hook(zeroed)
    assert not torch.equal(quiet(tokens), plain)


def test_a_scope_is_no_listener_in_another_thread(quiet):
    heads = quiet.blocks[1].mixer.heads
    with quiet.hooks([(NAME, zeroed)]), ThreadPoolExecutor(1) as elsewhere:
        assert heads[2].listens("hook_write")
        assert not elsewhere.submit(heads[2].listens, "hook_write").result()


@pytest.mark.parametrize("again", [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))])
def test_a_copy_of_hook_points_hears_its_own_hooks(again: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    hooks = HookedRecurrent.from_hf(make_hf("qwen3_5")).blocks[1]
    mixer = again(hooks).mixer
    assert not mixer.listens("hook_q")
    mixer.hook_q.add_hook(zeroed)
    assert mixer.listens("hook_q") and not hooks.mixer.listens("hook_q")
