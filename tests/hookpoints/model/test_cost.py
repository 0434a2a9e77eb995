"""Costs are those of real runs, to the byte."""

from __future__ import annotations

import pytest
import torch
from conftest import make_hf

from hookpoints import Cost, HookedRecurrent, UnknownHookError, UnsupportedModelError, cost
from hookpoints.errors import InputError
from hookpoints.memory.caches import tensors_of
from hookpoints.model.cost import held

T = 64
NEED_NUMBERS = ("glm5_next", "qwen4_exp")
"""Their attention picks tokens by what it computes."""


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def real(request: pytest.FixtureRequest, hooked: HookedRecurrent) -> HookedRecurrent:
    """One model of each family, with weights."""
    model_type = hooked.cfg.model_type.removesuffix("_text")
    return HookedRecurrent.from_hf(make_hf(model_type).to(request.param), self_check=False)


def test_every_hook_cached_run_memory_and_weight_costs_what_a_real_run_holds(real: HookedRecurrent) -> None:
    if real.cfg.model_type.removesuffix("_text") in NEED_NUMBERS:
        with pytest.raises(UnsupportedModelError, match="cannot be counted: a layer of it needs numbers"):
            cost(real, tokens=T)
        return
    counted = cost(real, tokens=T)
    tokens = torch.randint(2, real.cfg.d_vocab, (1, T))
    with torch.no_grad():
        _, every = real.run_with_cache(tokens, names_filter=lambda name: True)
        _, plain = real.run_with_cache(tokens)
    sizes = [(tuple(value.shape), value.dtype) for value in every.values()]
    assert sorted(map(str, sizes)) == sorted(
        str((hook.shape, hook.dtype)) for hook in counted.hooks for _ in range(hook.n)
    )
    assert counted.cached == held(plain.values())
    assert counted.weights == held([*real.hf_model.parameters(), *real.hf_model.buffers()])
    states = [every[f"blocks.{layer}.mixer.hook_state"][:, 0] for layer in real.cfg.recurrent_layers]
    assert counted.state == sum(state.numel() * state.element_size() for state in states)
    try:
        memory = real.memory(tokens)
    except UnsupportedModelError:
        assert counted.memory is None
    else:
        assert counted.memory == held([*memory.kept.values(), *tensors_of(memory.cache).values()])


def test_a_filter_costs_the_hooks_that_it_names(model: HookedRecurrent) -> None:
    shape = model.cfg.layer(1)
    write = T * shape.K * shape.V * 4
    one = "blocks.1.mixer.heads.0.hook_write"
    assert cost(model, tokens=T, names_filter=one).cached == write
    every = cost(model, tokens=T, names_filter=lambda name: name.endswith("mixer.hook_write"))
    assert every.cached == write * shape.H * len(model.cfg.layers)
    with pytest.raises(UnknownHookError, match=r"blocks\.1\.mixer\.hook_write"):
        cost(model, tokens=T, names_filter="blocks.1.mixer.hook_writes")


def test_a_name_a_configuration_and_a_model_cost_the_same_and_none_is_touched() -> None:
    model = HookedRecurrent.from_pretrained("embedded-mamba2")
    before = [parameter.data_ptr() for parameter in model.parameters()]
    costs = [cost(given, tokens=T) for given in ("embedded-mamba2", model)]
    assert costs[0] == costs[1]
    unnamed = cost(model.hf_model.config, tokens=T)
    assert unnamed == Cost(**{**vars(costs[0]), "model_name": unnamed.model_name})
    assert [parameter.data_ptr() for parameter in model.parameters()] == before
    assert cost(model, tokens=T, dtype=torch.bfloat16).weights == costs[1].weights / 2


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="tokens: expected 1 or more, got 0"):
        cost("embedded", tokens=0)
