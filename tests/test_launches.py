"""Launches, waits and copies on a GPU stay below their ceilings, counted on the pretended device."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import counted
import device
import pytest
import torch

from hookpoints import HookedRecurrent, attribute
from sae_lens_writesae import LowRank, train, training_config
from sae_lens_writesae.sae import fast, training
from sae_lens_writesae.sae.fast import Stack
from sae_lens_writesae.sae.fused import Dead

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import launches


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_passes_stay_below_their_ceilings() -> None:
    with device.pretended() as seen:
        costs = launches.of_passes(seen, 32)
    native, native_decode = costs["native forward"], costs["native decode"]
    steered, attached = costs["decode, steered toward a token"], costs["decode, attached"]
    for kind in ("sync", "to_device", "to_host"):
        assert attached[kind] == steered[kind] == native_decode[kind], kind
    assert attached["launch"] == native_decode["launch"]
    more = {name: costs[name]["launch"] - native["launch"] for name in ("idle hooks", "one head's writes read")}
    assert more["idle hooks"] <= 1 and more["one head's writes read"] <= 20
    assert launches.waits(costs["idle hooks"]) <= launches.waits(native) + 1
    # Two more waits at most: for ids, and for where the span of a write is looked for or whether an edit is finite.
    for what in ("one head's writes read", "one edit", "all hooks"):
        assert launches.waits(costs[what]) <= launches.waits(native) + 2, what
    assert costs["memory without a span"]["launch"] <= 2 * costs["memory"]["launch"]
    assert costs["session of 64 replaces, 64 positions"]["sync"] <= 1


def test_writes_replaced_at_every_token_take_no_launches_a_token() -> None:
    """As SAELens' evaluations splice a dictionary in. Token by token there are seven a token more."""
    with device.pretended() as seen, torch.no_grad():
        model = HookedRecurrent.from_pretrained("embedded", device="npu", self_check=False)
        ids = torch.ones(1, 128, dtype=torch.long, device="npu")
        hook = ("blocks.2.mixer.heads.1.hook_write_vec", lambda write, hook: 0.9 * write)
        model.run_with_hooks(ids, fwd_hooks=[hook])
        native = seen.of(lambda: model(ids))
        spliced = seen.of(lambda: model.run_with_hooks(ids, fwd_hooks=[hook]))
    assert spliced["launch"] <= native["launch"] + 200


@pytest.mark.slow
def test_a_graph_stays_below_its_ceilings() -> None:
    """Of 15 tokens: all nodes measured, edges, and random writes."""
    model = HookedRecurrent.from_pretrained("embedded", device="cpu", self_check=False)
    tokens = torch.arange(100, 115)[None]
    with device.pretended() as seen:
        model.to("npu")
        costs = seen.of(lambda: attribute(tokens.to("npu"), model))
    assert costs["launch"] <= 20_000
    assert costs["sync"] <= 70 and costs["to_device"] <= 35 and costs["to_host"] <= 25


def config(place: str, **settings: Any) -> Any:
    model = HookedRecurrent.from_pretrained("embedded", device="meta")
    sizes: dict[str, Any] = {"d_sae": 64, "sae": {"k": 4}, "training_tokens": 40 * 32, "train_batch_size_tokens": 32}
    return training_config(model, 4, 2, device=place, verbose=False, dead_feature_window=8, **sizes | settings)


def writes() -> tuple[torch.Tensor, torch.Tensor]:
    shape, g = HookedRecurrent.from_pretrained("embedded", device="meta").cfg.layer(4), torch.Generator().manual_seed(0)
    return torch.randn(256, shape.K, generator=g), torch.randn(256, shape.V, generator=g)


def test_weights_that_are_not_finite_are_refused_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device is looked at before the first step, and then at the 64th, which this run does not reach."""
    for module in (fast, training):
        monkeypatch.setattr(module, "START_STEPS", 0)
    with device.pretended(), pytest.raises(ValueError, match="expected finite"):
        train(config("npu", architecture="writesae_topk", lr=1e38, training_tokens=8 * 32), LowRank.rank_one(*writes()))


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str, int]]]:
    """What is noted, in its order."""
    noted: list[tuple[str, str, int]] = []
    monkeypatch.setattr(counted.Seen, "note", lambda _, kind, op, n=1: noted.append((kind, op, n)))
    with device.pretended():
        yield noted


def test_two_steps_launch_the_same_so_that_a_graph_can_replay_them(order: list[tuple[str, str, int]]) -> None:
    keys, values = (side[:, None].to("npu") for side in writes())
    stack, rows, steps = Stack([config("npu")], [LowRank(keys, values)], [None]), torch.arange(32).to("npu"), []
    for _ in range(25):
        order.clear()
        stack.take([stack.rows(0, rows)])
        steps.append(list(order))
    assert steps[-1] == steps[-2] and {kind for kind, _, _ in steps[-1]} <= {"launch", "bytes"}
    assert sum(n for kind, _, n in steps[-1] if kind == "launch") <= 260  # with dead atoms


def test_a_step_gives_the_gradients_of_a_host() -> None:
    def gradients(place: str) -> dict[str, Any]:
        stack = Stack([config(place)], [LowRank.rank_one(*(side.to(place) for side in writes()))], [None])
        dead = torch.arange(64)[None].to(place) % 3 == 0
        stack.losses(stack.p, [stack.rows(0, torch.arange(32).to(place))], stack.ks, Dead(dead, 40))
        return {name: parameter.grad for name, parameter in stack.p.items()}

    expected = gradients("cpu")
    with device.pretended():
        for name, gradient in gradients("npu").items():
            assert gradient.device == device.NPU
            torch.testing.assert_close(gradient.cpu(), expected[name], rtol=1e-5, atol=1e-6)
