"""States as parameters: gradients against finite differences, and states that descend."""

from __future__ import annotations

import pytest
import torch
from remembering import drawn_ids
from tiny_models import KeepFloat64, fast_of, hooked_in_float64
from torch.testing import assert_close

from hookpoints import HookedRecurrent

READ = drawn_ids(2, 9)
FAMILIES = ("falcon_h1", "mamba", "mamba2", "olmo_hybrid", "qwen3_5", "rwkv7", "zamba2")


@pytest.fixture(scope="module", params=fast_of(("mamba", "mamba2", "qwen3_5", "rwkv7"), FAMILIES))
def _read(request):
    with KeepFloat64():
        model = hooked_in_float64(request.param)
        return model, model.memory(READ)


@pytest.fixture
def read(_read):
    """A model in float64, and its memory of READ."""
    with KeepFloat64():
        yield _read


@pytest.mark.parametrize("count", [1, 70])
def test_gradients_of_states_are_finite_differences(read, count):
    """Of one token, which upstream reads by another op; and of more than a chunk."""
    model, memory = read
    later = drawn_ids(2, count, seed=1)
    states = {layer: memory.state(layer).requires_grad_() for layer in memory.forms}
    torch.manual_seed(0)
    along = {layer: torch.randn_like(state) * state.detach().std() for layer, state in states.items()}
    logits = model.logits_after(memory.with_states(states), later, gradients=True)
    weights = torch.randn_like(logits)
    gradients = torch.autograd.grad((logits * weights).sum(), list(states.values()))
    slope = sum((gradient * along[layer]).sum() for layer, gradient in zip(states, gradients, strict=True))

    def moved(by: float) -> torch.Tensor:
        changed = memory.with_states({layer: state.detach() + by * along[layer] for layer, state in states.items()})
        return (model.logits_after(changed, later) * weights).sum()

    assert_close(slope, (moved(1e-6) - moved(-1e-6)) / 2e-6, rtol=1e-6, atol=0)
    assert_close(logits, model.logits_after(memory.with_states(states), later), rtol=0, atol=1e-12)
    assert not any(memory.state(layer).requires_grad for layer in states)


def test_gradients_of_weights_after_a_memory_are_finite_differences(model64):
    """The memory stays as it is: what the weights once made of its tokens is no part of the gradient."""
    memory, later = model64.memory(READ), drawn_ids(2, 5, seed=1)
    weight = model64.hf_model.model.layers[0].linear_attn.conv1d.weight
    torch.manual_seed(0)
    along = torch.randn_like(weight)
    (gradient,) = torch.autograd.grad(model64.logits_after(memory, later, gradients=True).square().sum(), weight)

    def moved(by: float) -> torch.Tensor:
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.add_(by * along)
            size = model64.logits_after(memory, later).square().sum()
            weight.copy_(kept)
        return size

    assert_close((gradient * along).sum(), (moved(1e-6) - moved(-1e-6)) / 2e-6, rtol=1e-6, atol=0)


def test_a_state_is_copied_and_its_gradient_is_kept_out_of_what_is_read(read):
    model, memory = read
    layer = next(iter(memory.forms))
    state = memory.state(layer).requires_grad_()
    changed = memory.with_states({layer: state})
    assert changed.state(layer).requires_grad and (changed + {layer: state}).state(layer).requires_grad
    with torch.no_grad():
        state.zero_()
    assert torch.equal(changed.state(layer), memory.state(layer))
    later = model.memory(READ, memory=changed)
    assert not any(later.state(each).requires_grad for each in later.forms)
    assert not model.logits_after(changed, READ).requires_grad
    tokens = model.generate(READ, memory=changed, max_new_tokens=2, do_sample=False)
    assert torch.equal(tokens, model.generate(READ, memory=memory, max_new_tokens=2, do_sample=False))


def test_a_state_is_trained_to_know_what_was_never_told():
    """Facts that no text states are put into the state in which the model begins to read, by gradient descent."""
    model = HookedRecurrent.from_pretrained("facts")
    begin = model.memory("Iris keeps a parrot .").rewind(0)
    facts = {"Ben lives in": "Rome", "Iris keeps a": "hamster"}
    answers = torch.tensor([model.to_single_token(value) for value in facts.values()])

    def log_probs(memory, gradients=False):
        logits = [model.logits_after(memory, question, gradients=gradients)[0, -1] for question in facts]
        return torch.stack(logits).log_softmax(-1)

    assert not torch.equal(log_probs(begin).argmax(-1), answers)
    states = {layer: begin.state(layer).requires_grad_() for layer in begin.forms}
    descent = torch.optim.Adam(states.values(), lr=0.1)
    for _ in range(15):
        loss = -log_probs(begin.with_states(states), gradients=True)[range(2), answers].sum()
        descent.zero_grad()
        loss.backward()
        descent.step()
    told = begin.with_states({layer: state.detach() for layer, state in states.items()})
    assert torch.equal(log_probs(told).argmax(-1), answers)
    assert all(torch.equal(begin.state(layer), torch.zeros_like(state)) for layer, state in states.items())
