"""Continuations: greedy rows against full passes with their own edits, and sampled ones that change nothing else."""

from __future__ import annotations

import torch
from saes import HEAD, LAYER
from torch import Tensor

from hookpoints import HookedRecurrent, WriteEdit
from sae_lens_writesae.steering import value_direction
from writesae_study.experiment.generation import greedy_rows, sample_continuations


def toward(model: HookedRecurrent, token: int, positions: tuple[int, ...], size: float) -> list[WriteEdit]:
    value = size * value_direction(model, LAYER, HEAD, token)
    key = torch.nn.functional.normalize(torch.arange(1.0, model.cfg.layer(LAYER).K + 1).to(value), dim=0)
    return [WriteEdit(LAYER, HEAD, t, key, value) for t in positions]


def test_greedy_rows_are_the_argmax_of_full_passes_with_their_own_edits(
    model64: HookedRecurrent, prompt_text: Tensor
) -> None:
    model, prompts = model64, prompt_text[:3, :9]
    rows = [[], toward(model, 5, (6, 7, 8), 6.0), toward(model, 9, (7,), -4.0)]
    for prompt, row, continuation in zip(prompts, rows, greedy_rows(model, prompts, rows, 4, batch_size=2)):
        ids = prompt[None]
        for token in continuation:
            last = model.run_with_edits(ids, [row]).logits[0, -1] if row else model(ids).detach()[0, -1]
            assert token == int(last.argmax())
            ids = torch.cat([ids, torch.tensor([[token]])], 1)


def test_samples_depend_on_the_seed_alone_and_rows_that_grow_past_the_dtype_are_marked(
    model64: HookedRecurrent, prompt_text: Tensor
) -> None:
    prompts, before = prompt_text[:3, :5], torch.random.get_rng_state()
    native = sample_continuations(model64, prompts, 6, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before) and native.shape == (3, 6) and (native >= 0).all()
    assert not torch.equal(native, sample_continuations(model64, prompts, 6, seed=4))

    def broken(writes: Tensor, hook: object) -> Tensor:
        return torch.where(torch.tensor([False, True, False])[:, None, None, None], torch.nan, writes)

    with model64.hooks(fwd_hooks=[(f"blocks.{LAYER}.mixer.heads.{HEAD}.hook_write", broken)]):
        sampled = sample_continuations(model64, prompts, 6, seed=3)
    assert (sampled[1] == -1).all() and torch.equal(sampled[::2], native[::2])
