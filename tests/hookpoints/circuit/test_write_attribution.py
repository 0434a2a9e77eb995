"""Predicted effects of writes: exact through recurrence and norm in every family, derivatives to first order."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pandas as pd
import pytest
import torch
from remembering import drawn_ids
from tiny_models import make_hf
from torch import Tensor
from torch.nn import functional as F

from hookpoints import HookedRecurrent, attribute, write_attribution
from hookpoints.circuit import nodes
from hookpoints.circuit.nodes import read_gradients
from hookpoints.circuit.norms import constants
from hookpoints.errors import InputError

SEQUENCE = drawn_ids(1, 24, seed=3)
OTHER = drawn_ids(1, 24, seed=4)


def metric(logits: Tensor) -> Tensor:
    return logits[0, -1, 5] - logits[0, -1].log_softmax(-1)[9]


def at(table, layer: int, head: int, position: int) -> float:
    (value,) = table.query("layer == @layer and head == @head and position == @position")["attribution"]
    return value


@pytest.mark.parametrize("frozen", [False, True])
def test_blocks_of_a_long_text_run_again(hooked: HookedRecurrent, frozen: bool, monkeypatch: Any) -> None:
    """Also where weights are trained; and hooks and weights are as before."""
    found = []
    for longest, trained in ((nodes._LONG, False), (8, not frozen)):
        monkeypatch.setattr(nodes, "_LONG", longest)
        hooked.requires_grad_(trained)
        try:
            found.append(read_gradients(hooked, SEQUENCE, metric, frozen, ("hook_embed",)))
            assert all(weight.requires_grad == trained for weight in hooked.hf_model.parameters())
        finally:
            hooked.requires_grad_(False)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-8)
    assert not any(point.fwd_hooks for point in hooked.hook_dict.values())


@pytest.mark.parametrize("corrupt", [None, OTHER], ids=["deleted", "replaced"])
def test_first_order_is_a_derivative(ruled64: HookedRecurrent, corrupt: Tensor | None) -> None:
    """A write that moves a little toward nothing, or toward that of the other text, takes off its share."""
    table = write_attribution(ruled64, SEQUENCE, metric, corrupt=corrupt)
    layers = ruled64.cfg.recurrent_layers
    for layer, head, position in ((layers[0], ruled64.cfg.layer(layers[0]).H // 2, 3), (layers[-1], 0, 20)):
        texts = (SEQUENCE,) if corrupt is None else (SEQUENCE, corrupt)
        own, *other = (ruled64.recurrence(text, layer).write(head, position)[0, 0, 0] for text in texts)
        change = own - other[0] if other else own

        def moved(step, layer=layer, head=head, position=position, change=change):
            def hook(write, hook):
                write[:, position] -= step * change

            name = f"blocks.{layer}.mixer.heads.{head}.hook_write"
            with torch.no_grad():
                return float(metric(ruled64.run_with_hooks(SEQUENCE, fwd_hooks=[(name, hook)])))

        slope = (moved(-1e-4) - moved(1e-4)) / 2e-4
        assert at(table, layer, head, position) == pytest.approx(slope, rel=1e-3, abs=1e-7)


def test_patterns_that_are_held_take_no_gradient() -> None:
    """Neither by queries nor by keys; values do."""
    q, k, v = torch.randn(3, 1, 1, 4, 2, requires_grad=True).unbind()
    with constants(frozen=True):
        read = F.scaled_dot_product_attention(q, k, v)
    assert torch.autograd.grad(read.sum(), (q, k), allow_unused=True) == (None, None)


@pytest.mark.parametrize(
    "mode", [torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)], ids=["inference", "autocast"]
)
def test_modes_of_the_caller_do_not_matter(model: HookedRecurrent, mode: Any) -> None:
    """Neither inference mode nor autocast, also of the tokens; and they are in force again afterwards."""
    modes = (torch.is_inference_mode_enabled, partial(torch.is_autocast_enabled, "cpu"), torch.is_grad_enabled)

    def explained(tokens: Tensor) -> tuple[pd.DataFrame, ...]:
        graph = attribute(tokens, model, [3], measure=1, targets=1)
        answer = pd.DataFrame([graph.keep(["L1H0@4"])])
        return write_attribution(model, tokens, metric), graph.nodes, graph.edges, graph.why("L1H0@4", 20), answer

    plain = explained(SEQUENCE)
    with mode:
        before = [is_on() for is_on in modes]
        assert all(table.equals(again) for table, again in zip(plain, explained(SEQUENCE + 0)))
        assert before == [is_on() for is_on in modes]


def test_weights_of_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        model = HookedRecurrent.from_hf(make_hf())
    for explain in (lambda: write_attribution(model, SEQUENCE, metric), lambda: attribute(SEQUENCE, model)):
        with pytest.raises(InputError, match=r"in torch\.inference_mode"):
            explain()


def test_another_thread_trains_meanwhile() -> None:
    """Weights that are trained keep their gradients while a metric, in the midst of an attribution, waits for it."""
    model = HookedRecurrent.from_hf(make_hf(), trainable=True)
    weights = list(model.hf_model.parameters())

    def slopes() -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(model(SEQUENCE, return_type="loss"), weights, allow_unused=True)

    with ThreadPoolExecutor(1) as pool:

        def metric_of(logits: Tensor) -> Tensor:
            assert None not in pool.submit(slopes).result()
            return metric(logits)

        write_attribution(model, SEQUENCE, metric_of)
