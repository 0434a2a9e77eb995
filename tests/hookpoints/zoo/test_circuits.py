"""Induction and parity: the circuits of the truth tables are in the models, read through public names alone."""

from __future__ import annotations

import pytest
import torch

from hookpoints import HookedRecurrent, zoo


def drawn(name: str, seed: int, **sizes: int) -> zoo.Batch:
    return zoo.task(name).batch(64, torch.Generator().manual_seed(seed), queries=4, **sizes)


def right(model: HookedRecurrent, batch: zoo.Batch) -> float:
    return (model(batch.tokens).argmax(-1).gather(1, batch.positions) == batch.answers).double().mean().item()


@torch.no_grad()
@pytest.mark.parametrize(("layer", "back"), [(0, 1), (1, 9)])
def test_induction_is_a_head_that_looks_one_back_and_one_that_looks_behind_the_first_occurrence(layer, back):
    """10 words, which is no size of the truth table."""
    model, batch = HookedRecurrent.from_pretrained("induction"), drawn("induction", 7, words=10)
    hook = f"blocks.{layer}.mixer.hook_pattern"
    _, cache = model.run_with_cache(batch.tokens, names_filter=hook)
    others = cache[hook][:, 0].abs() * (1 - torch.eye(batch.tokens.shape[1]))
    assert (others.argmax(-1).gather(1, batch.positions) == batch.positions - back).double().mean() > 0.9

    def ablate(pattern: torch.Tensor, hook: object) -> torch.Tensor:
        pattern = pattern.clone()
        pattern.diagonal(-back, 2, 3).zero_()
        return pattern

    assert right(model, batch) > 0.98
    with model.hooks([(hook, ablate)]):
        assert right(model, batch) < 0.15


@torch.no_grad()
def test_parity_is_an_eigenvalue_of_minus_one():
    """Of the transition along the key of a 1; a 0 leaves the state's sign. 128 bits, three times the longest seen."""
    model, batch = HookedRecurrent.from_pretrained("parity"), drawn("parity", 7, bits=128)
    r = model.recurrence(batch.tokens, 0)
    eigenvalue = r.log_decay.exp() * (1 - r.beta * r.k.square().sum(-1))
    of_ones = eigenvalue[:, 1:, 0][batch.symbols["values"] == 1]
    assert of_ones.max() < -0.97 and eigenvalue[:, 1:, 0][batch.symbols["values"] == 0].min() > -0.5
    assert right(model, batch) > 0.99
