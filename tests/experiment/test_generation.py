"""Continuations: greedy rows against full passes with their own edits, and sampled ones that change nothing else."""

from __future__ import annotations

import pytest
import torch
from planted import HEAD, LAYER
from torch import Tensor

from hookpoints import EditError, HookedRecurrent, WriteEdit
from sae_lens_writesae.steering import value_direction
from writesae.experiment.generation import greedy_rows, sample_continuations


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(1, 64, (6, 21), generator=torch.Generator().manual_seed(8))


def toward(model: HookedRecurrent, token: int, positions: tuple[int, ...], size: float) -> list[WriteEdit]:
    value = size * value_direction(model, LAYER, HEAD, token)
    key = torch.nn.functional.normalize(torch.arange(1.0, model.cfg.layer(LAYER).K + 1).to(value), dim=0)
    return [WriteEdit(LAYER, HEAD, t, key, value) for t in positions]


def test_greedy_rows_are_the_argmax_of_full_passes_with_their_own_edits(
    model64: HookedRecurrent, tokens: Tensor
) -> None:
    model, prompts = model64, tokens[:3, :9]
    rows = [[], toward(model, 5, (6, 7, 8), 6.0), toward(model, 9, (7,), -4.0)]
    for prompt, row, continuation in zip(prompts, rows, greedy_rows(model, prompts, rows, 4, batch_size=2)):
        ids = prompt[None]
        for token in continuation:
            last = model.run_with_edits(ids, [row]).logits[0, -1] if row else model(ids).detach()[0, -1]
            assert token == int(last.argmax())
            ids = torch.cat([ids, torch.tensor([[token]])], 1)


def test_rows_must_match_prompts_and_edits_must_act(model64: HookedRecurrent, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match="3 and 2"):
        greedy_rows(model64, tokens[:3, :9], [[], []], 2)
    with pytest.raises(EditError, match="position 40"):
        greedy_rows(model64, tokens[:1, :9], [toward(model64, 5, (40,), 1.0)], 2)


def test_a_continuation_ends_before_the_end_of_sequence_token(
    model64: HookedRecurrent, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = tokens[:1, :9]
    (whole,) = greedy_rows(model64, prompt, [[]], 6)
    monkeypatch.setattr(model64.hf_model.generation_config, "eos_token_id", whole[2])
    assert greedy_rows(model64, prompt, [[]], 6) == [whole[: whole.index(whole[2])]]


def test_samples_are_the_same_for_one_seed_and_leave_the_generator_alone(
    model64: HookedRecurrent, tokens: Tensor
) -> None:
    before = torch.random.get_rng_state()
    one = sample_continuations(model64, tokens[:3, :5], 6, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before) and one.tokens.shape == (3, 6) and one.finite.all()
    assert torch.equal(one.tokens, sample_continuations(model64, tokens[:3, :5], 6, seed=3).tokens)
    assert not torch.equal(one.tokens, sample_continuations(model64, tokens[:3, :5], 6, seed=4).tokens)


def test_a_continuation_that_grows_past_the_dtype_is_marked_and_leaves_the_others_alone(
    model64: HookedRecurrent, tokens: Tensor
) -> None:
    def broken(writes: Tensor, hook: object) -> Tensor:
        return torch.where(torch.tensor([False, True, False])[:, None, None, None], torch.nan, writes)

    prompts = tokens[:3, :5]
    native = sample_continuations(model64, prompts, 6, seed=3)
    with model64.hooks(fwd_hooks=[(f"blocks.{LAYER}.mixer.heads.{HEAD}.hook_write", broken)]):
        sampled = sample_continuations(model64, prompts, 6, seed=3)
    assert sampled.finite.tolist() == [True, False, True] and sampled.tokens.shape == (3, 6)
    assert torch.equal(sampled.tokens[::2], native.tokens[::2])
