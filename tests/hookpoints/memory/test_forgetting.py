"""Whether a span is gone: by equality, in every kind of cache, and by the attack of somebody who has a list."""

from __future__ import annotations

import pytest
import torch
from remembering import drawn_ids
from tiny_models import KeepFloat64, hooked_in_float64

from hookpoints import HookedRecurrent, Memory, embedded, forgot
from hookpoints.errors import InputError
from hookpoints.memory.forgetting import Certificate, Difference, _part_differences, _relative_error, _state_distance

SPAN = (40, 48)
TYPES = ("bailing_hybrid", "falcon_h1", "jamba", "mamba", "mamba2", "olmo_hybrid", "qwen3_5", "rwkv7", "zamba2")
"""One of each kind of cache, as in the tests of memories."""


@pytest.mark.parametrize("name", TYPES)
def test_an_exact_cut_equals_a_memory_that_never_read_the_span(name):
    with KeepFloat64():
        model = hooked_in_float64(name)
        memory = model.memory(drawn_ids(2, 21))
        for span in ((7, 12), (0, 21)):
            certificate = forgot(memory, memory.without(span), span)
            assert certificate.gone, certificate
        parts = {(each.layer, each.part) for each in certificate.differences}
        assert {(layer, "state") for layer in memory.forms} <= parts
        assert not memory.kept.attention or any(part == "keys" for _, part in parts)
        approximate = forgot(memory, memory.without((7, 12), approximate=True), (7, 12))
        assert not approximate.gone and "times rounding" in str(approximate)


@pytest.fixture(scope="module")
def model():
    """With attention, convolutions and states."""
    return HookedRecurrent.from_pretrained("embedded")


@pytest.fixture(scope="module")
def phrases(model):
    """[6,96] texts of held-out speeches."""
    tokens = model.to_tokens(embedded.text("test")[:40_000], truncate=False)[0]
    return tokens[: 6 * 96].view(6, 96)


def test_a_list_of_candidates_names_what_was_cut_approximately(model, phrases, tmp_path):
    """Also after a file; an exact cut is as far from the span as from any other candidate that was never read."""
    text = phrases[:1]
    memory = model.memory(text)
    memory.save(tmp_path / "memory")
    candidates = phrases[1:, SPAN[0] : SPAN[1]].tolist()
    phrase = str(model.to_string(text[0, slice(*SPAN)]))
    for before in (memory, Memory.load(tmp_path / "memory", model)):
        approximate = forgot(before, before.without(SPAN, approximate=True), SPAN, candidates=candidates)
        assert [each.text for each in approximate.candidates].index(phrase) == 0 and len(approximate.candidates) == 6
        assert approximate.candidates[0].distance < 1e-6 < approximate.candidates[1].distance
        assert repr(phrase) in str(approximate)
    exact = forgot(memory, memory.without(SPAN), SPAN, candidates=candidates)
    assert exact.gone
    doubled = memory.with_states({layer: 2 * memory.state(layer) for layer in memory.forms})
    assert _state_distance(doubled, memory) == pytest.approx(len(memory.forms))  # one of each layer
    for each in exact.candidates:  # what is known of the span is what a memory knows that never read it
        assert each.distance == pytest.approx(each.never, rel=1e-3)


@pytest.mark.parametrize("name", embedded.names())
def test_in_half_precision_rounding_is_that_of_half_precision(phrases, name):
    memory = HookedRecurrent.from_pretrained(name, dtype=torch.bfloat16).memory(phrases[:1])
    assert forgot(memory, memory.without(SPAN), SPAN).gone
    assert not forgot(memory, memory.without(SPAN, approximate=True), SPAN).gone


def test_states_that_are_rounded_or_noisy_are_not_equal(phrases, model):
    memory = model.memory(phrases[:1])
    cut = memory.without(SPAN)
    for change in (lambda x: x.bfloat16().float(), lambda x: x + 0.01 * x.std() * torch.randn_like(x)):
        changed = cut.with_states({layer: change(cut.state(layer)) for layer in cut.forms})
        assert not forgot(memory, changed, SPAN).gone


def test_a_memory_equals_the_nearer_of_two_and_their_distance_is_the_unit(model, phrases):
    never, parted, other = (model.memory(text[None]) for text in phrases[:3])
    for memory in (never, parted):
        assert all(each.units == 0 for each in _part_differences(memory, never, parted))
    state = [each.units for each in _part_differences(other, never, parted) if each.part == "state"]
    assert state == pytest.approx([1] * len(state), abs=0.7)
    x, y = torch.tensor([[2e-6, 1.0], [1e-6, 1.0]])[:, None, :, None, None]
    assert _relative_error(x, y) == pytest.approx(1)  # of the head where it is largest


def test_one_head_of_one_row_that_differs_is_named(model, phrases):
    memory = model.memory(phrases[:2])
    cut = memory.without(SPAN)
    layer = model.cfg.recurrent_layers[-1]
    state = cut.state(layer)
    state[1, 2] *= 1.001
    certificate = forgot(memory, cut.with_states({layer: state}), SPAN)
    assert [reason.split(":")[0] for reason in certificate.missing] == [f"state of layers {layer}"]


def test_attention_that_still_holds_the_span_is_named(model, phrases):
    memory = model.memory(phrases[:1])
    cut = memory.without(SPAN)
    left = memory.with_states({layer: cut.state(layer) for layer in cut.forms})
    certificate = forgot(memory, left, SPAN)
    assert "keys of layers 0: of other tokens" in certificate.missing
    assert f"tokens {SPAN[0]} to {SPAN[1] - 3} say it" in certificate.missing
    states = [each.units for each in certificate.differences if each.part == "state"]
    assert max(states) < 10 and forgot(memory, cut, SPAN).gone


def test_a_copy_of_the_span_elsewhere_is_named(model, phrases):
    """Of two rows one has it; the copy has another token at its beginning."""
    span = phrases[0, slice(*SPAN)]
    text = torch.cat([phrases[0, :60], torch.tensor([5]), span[1:], phrases[0, 60:88]])
    memory = model.memory(torch.stack([phrases[1], text]))
    certificate = forgot(memory, memory.without(SPAN), SPAN)
    assert not certificate.gone
    assert certificate.copies == [(60 - 8 + 1, 60 - 8 + 1 + 6)]  # without the first token, and the last


def test_two_tokens_of_a_short_span_are_no_copy_of_it(model):
    memory = model.memory(torch.tensor([[5, 9, 11, 12, 30, 9, 11, 31, 9, 11, 12, 40]]))
    assert forgot(memory, memory.without((1, 4)), (1, 4)).copies == [(5, 8)]
    assert not forgot(memory, memory.without((4, 6)), (4, 6)).copies


def test_a_memory_that_was_cut_approximately_before_is_no_measure_of_rounding(model, phrases):
    """Else what it still holds of one span would hide what another cut leaves of a second one."""
    before = model.memory(phrases[:1]).without((10, 18), approximate=True)
    assert not forgot(before, before.without(SPAN, approximate=True), SPAN).gone
    assert not forgot(before, before.without(SPAN), SPAN).gone  # it holds what the first cut left
    again = model.memory(before.tokens)
    assert forgot(before, again.without(SPAN), SPAN).gone


def test_nothing_that_is_no_number_is_gone():
    certificate = Certificate("a", [Difference(0, "state", float("nan"))], [], [], 10)
    assert not certificate.gone and certificate.missing == ["state of layers 0: nan times rounding"]


def test_bad_input_is_refused(model, phrases):
    other = HookedRecurrent.from_pretrained("embedded-mamba2")
    memory, cut = model.memory(phrases[:1]), model.memory(phrases[:1]).without(SPAN)
    with pytest.raises(InputError, match="after: expected a memory of the 88 tokens"):
        forgot(memory, model.memory(phrases[1:2]), SPAN)
    with pytest.raises(InputError, match="expected a memory of this model"):
        forgot(memory, other.memory(phrases[:1]), SPAN)
    with pytest.raises(InputError, match="span: expected start < stop"):
        forgot(memory, cut, (90, 99))
    rows = model.memory(phrases[:2])
    with pytest.raises(InputError, match="candidates: expected memories of one row"):
        forgot(rows, rows.without(SPAN), SPAN, candidates=[" the war"])
