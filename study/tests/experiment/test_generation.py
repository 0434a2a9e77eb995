"""Sampled continuations, which change nothing else."""

from __future__ import annotations

import torch
from saes import HEAD, LAYER
from torch import Tensor

from hookpoints import HookedRecurrent
from writesae_study.experiment.generation import sample_continuations


def test_a_row_that_grows_past_the_dtype_is_marked_and_moves_no_other(
    model64: HookedRecurrent, prompt_text: Tensor
) -> None:
    prompts, before = prompt_text[:3, :5], torch.random.get_rng_state()
    native = sample_continuations(model64, prompts, 6, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before) and (native >= 0).all()

    def broken(writes: Tensor, hook: object) -> Tensor:
        return torch.where(torch.tensor([False, True, False])[:, None, None, None], torch.nan, writes)

    with model64.hooks(fwd_hooks=[(f"blocks.{LAYER}.mixer.heads.{HEAD}.hook_write", broken)]):
        sampled = sample_continuations(model64, prompts, 6, seed=3)
    assert (sampled[1] == -1).all() and torch.equal(sampled[::2], native[::2])
