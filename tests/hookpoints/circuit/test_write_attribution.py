"""Predicted effects of writes: exact through recurrence and norm in every family, derivatives to first order."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from remembering import drawn_ids
from tiny_models import KeepFloat64, hooked_in_float64, make_hf
from torch import Tensor
from torch.nn import functional as F

from hookpoints import HookedRecurrent, WriteEdit, attribute, write_attribution
from hookpoints.circuit import nodes
from hookpoints.circuit.nodes import read_gradients, record
from hookpoints.circuit.norms import constants
from hookpoints.errors import InputError, PredictionWarning

SEQUENCE = drawn_ids(1, 24, seed=3)
OTHER = drawn_ids(1, 24, seed=4)


def metric(logits: Tensor) -> Tensor:
    return logits[0, -1, 5] - logits[0, -1].log_softmax(-1)[9]


def at(table, layer: int, head: int, position: int) -> float:
    (value,) = table.query("layer == @layer and head == @head and position == @position")["attribution"]
    return value


def test_a_write_goes_exactly_through_recurrence_and_norm(hooked64: HookedRecurrent) -> None:
    """What an edited run hands on, times the gradient there."""
    if hooked64.cfg.layer(hooked64.cfg.recurrent_layers[0]).rule == "HGRN":
        pytest.skip("whose channels decay apart: its norm is met to first order")
    assert_exact(hooked64, predicted(hooked64))


@pytest.mark.parametrize(("corrupt", "frozen"), [(OTHER, False), (OTHER, True)])
def test_the_same_of_another_write_and_a_fixed_norm(
    ruled64: HookedRecurrent, corrupt: Tensor | None, frozen: bool
) -> None:
    assert_exact(ruled64, predicted(ruled64, corrupt, frozen), corrupt, frozen)


def predicted(model: HookedRecurrent, corrupt: Tensor | None = None, frozen: bool = False) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", PredictionWarning)
        table = write_attribution(model, SEQUENCE, metric, corrupt=corrupt, frozen=frozen)
    assert len(table) == SEQUENCE.shape[1] * sum(model.cfg.layer(layer).H for layer in model.cfg.recurrent_layers)
    return table


def assert_exact(model: HookedRecurrent, table: Any, corrupt: Tensor | None = None, frozen: bool = False) -> None:
    """Effects of a few writes are what edited runs hand on, times the gradient there."""
    gradients = read_gradients(model, SEQUENCE, metric, frozen)
    donors = None if corrupt is None else record(model, corrupt)
    largest = 0.0
    for layer in (model.cfg.recurrent_layers[0], model.cfg.recurrent_layers[-1]):
        name = f"blocks.{layer}.mixer.hook_z"
        with torch.no_grad():
            _, plain = model.run_with_cache(SEQUENCE, names_filter=name)
        for head, position in ((0, 3), (model.cfg.layer(layer).H - 1, 17)):
            edit = WriteEdit(layer, head, position, mode="delete")
            if donors is not None:
                r = donors[layer]
                edit = WriteEdit(
                    layer, head, position, keys=r.k[0, position, head], values=r.u[0, position, head], mode="replace"
                )
            with torch.no_grad(), model.edits(edit):
                _, edited = model.run_with_cache(SEQUENCE, names_filter=name)
            expected = float(((plain[name] - edited[name]) * gradients[name]).sum())
            found = at(table, layer, head, position)
            assert found == pytest.approx(expected, rel=1e-6, abs=1e-10), (layer, head, position)
            largest = max(largest, abs(expected))
    assert largest > 1e-9


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
    table = write_attribution(ruled64, SEQUENCE, metric, through=None, corrupt=corrupt)
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
    with constants(["patterns"]):
        read = F.scaled_dot_product_attention(q, k, v)
    assert torch.autograd.grad(read.sum(), (q, k), allow_unused=True) == (None, None)


@pytest.mark.parametrize("model_type", ["qwen3_5", "mamba2", "rwkv7"])
def test_a_norm_is_known_in_half_precision(model_type: str) -> None:
    model = HookedRecurrent.from_hf(make_hf(model_type).bfloat16())
    with warnings.catch_warnings():
        warnings.simplefilter("error", PredictionWarning)
        tables = [write_attribution(model, SEQUENCE, metric, through=through) for through in ("norm", None)]
    assert (tables[0].attribution - tables[1].attribution).abs().max() > 0


def test_a_head_without_a_norm_is_linear() -> None:
    """Mamba-1 hands its reads on through a gate alone, so that both kinds of prediction agree."""
    model = hooked_in_float64("mamba")
    with KeepFloat64():
        tables = [write_attribution(model, SEQUENCE, metric, through=through) for through in ("norm", None)]
    torch.testing.assert_close(*(torch.tensor(table.attribution.to_numpy()) for table in tables), rtol=1e-9, atol=1e-12)


def mean_square(x: Tensor) -> Tensor:
    return x.square().mean(-1, keepdim=True) + 1e-6


def centered(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


@pytest.mark.parametrize(
    ("form", "is_known"),
    [
        pytest.param(lambda x: x * torch.rsqrt(mean_square(x)), True, id="inverse root"),
        pytest.param(lambda x: x / mean_square(x).sqrt(), True, id="root"),
        pytest.param(lambda x: x * (1 / torch.sqrt(mean_square(x))), True, id="inverse of a root"),
        pytest.param(lambda x: x / torch.sqrt(x.var(-1, keepdim=True) + 1e-6), False, id="variance alone"),
        pytest.param(lambda x: centered(x) / torch.sqrt(x.var(-1, keepdim=True) + 1e-6), False, id="variance by V - 1"),
        pytest.param(lambda x: centered(x) * torch.rsqrt(mean_square(centered(x))), True, id="centered"),
        pytest.param(lambda x: x / torch.sqrt(torch.tensor(16.0).to(x)), True, id="constant"),
        pytest.param(lambda x: x * mean_square(x) ** -0.5, False, id="power"),
        pytest.param(lambda x: x / x.norm(dim=-1, keepdim=True), False, id="length"),
        pytest.param(lambda x: F.normalize(x, dim=-1), False, id="normalize"),
        pytest.param(lambda x: centered(x) / x.std(-1, keepdim=True), False, id="deviation"),
        pytest.param(lambda x: x / (mean_square(x).sqrt() + 0.1), False, id="root and more"),
        pytest.param(lambda x: x * torch.sqrt(1 / mean_square(x)), False, id="root of an inverse"),
        pytest.param(lambda x: (x * torch.rsqrt(mean_square(x))).tanh(), False, id="bent"),
    ],
)
def test_a_norm_that_is_written_by_hand_is_exact_or_warned_of(form: Callable[[Tensor], Tensor], is_known: bool) -> None:
    """Layers from the second on have it; those are predicted to first order where it is not known."""
    with KeepFloat64():
        hf: Any = make_hf().double()

        class Norm(torch.nn.Module):
            def forward(self, reads: Tensor, gate: Tensor) -> Tensor:
                return form(reads) * F.silu(gate)

        for layer in (1, 2):
            hf.model.layers[layer].linear_attn.norm = Norm()
        model = HookedRecurrent.from_hf(hf)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            table = write_attribution(model, SEQUENCE, metric)
        warned = [str(warning.message) for warning in seen if warning.category is PredictionWarning]
        assert len(warned) == (not is_known) and all("2 layer(s)" in each and "(layer 1: " in each for each in warned)
        if is_known:
            assert_exact(model, table)
        else:
            first_order = write_attribution(model, SEQUENCE, metric, through=None)
            same = (table.attribution - first_order.attribution).abs() < 1e-12
            assert same[table.layer > 0].all() and not same[table.layer == 0].all()
        assert not any(point.fwd_hooks for point in model.hook_dict.values())


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda model, tokens: write_attribution(model, tokens, metric), "one sequence"),
        (lambda model, tokens: write_attribution(model, tokens[:1], metric, corrupt=tokens[:1, 1:]), "as many as"),
        (lambda model, tokens: write_attribution(training(model), tokens[:1], metric), "training mode"),
    ],
)
def test_bad_input_is_named(tokens: Tensor, ask, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ask(HookedRecurrent.from_hf(make_hf()), tokens)


def training(model: HookedRecurrent) -> HookedRecurrent:
    model.train()
    return model


@pytest.mark.parametrize(
    "mode", [torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)], ids=["inference", "autocast"]
)
def test_modes_of_the_caller_do_not_matter(model: HookedRecurrent, mode: Any) -> None:
    """Neither inference mode nor autocast, also of the tokens; and they are in force again afterwards."""
    plain = write_attribution(model, SEQUENCE, metric)
    graph = attribute(SEQUENCE, model, [3], measure=1, targets=1)
    with mode:
        before = (torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), torch.is_grad_enabled())
        tokens = SEQUENCE + 0
        assert write_attribution(model, tokens, metric).equals(plain)
        again = attribute(tokens, model, [3], measure=1, targets=1)
        assert again.nodes.equals(graph.nodes) and again.edges.equals(graph.edges)
        assert again.keep(["L1H0@4"]) == graph.keep(["L1H0@4"])
        assert again.why("L1H0@4", 20).equals(graph.why("L1H0@4", 20))
        assert before == (
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.is_grad_enabled(),
        )


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
