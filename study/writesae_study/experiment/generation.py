"""Continuations of many prompts at once: greedy ones in which each row has its own edits, and sampled ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from hookpoints import EditRow, HookedRecurrent
from writesae.experiment.firings import bar


@torch.no_grad()
def greedy_rows(
    model: HookedRecurrent,
    tokens: Tensor,
    rows: Sequence[EditRow],
    max_new_tokens: int,
    *,
    batch_size: int = 256,
    progress: bool = False,
) -> list[list[int]]:
    """The greedy continuation of each prompt in `tokens` [N,T] under the edits in `rows` [N].

    Positions of edits count from the first prompt token; an empty row continues without edits. After its
    end-of-sequence token a continuation has padding.

    Raises:
        EditError: an edit does not fit the model, or generation ended before its position.
    """
    continuations: list[list[int]] = []
    for start in bar(range(0, len(rows), batch_size), "generate", progress):
        batch = slice(start, start + batch_size)
        texts = model.generate(
            tokens[batch],
            edit_rows=rows[batch],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=_pad_token(model),
        )
        continuations += cast(Tensor, texts)[:, tokens.shape[1] :].tolist()
    return continuations


@torch.no_grad()
def sample_continuations(
    model: HookedRecurrent, tokens: Tensor, new_tokens: int, seed: int, *, batch_size: int = 256
) -> Tensor:
    """Tokens [N,new_tokens], on the CPU, sampled at temperature 1 after prompts `tokens` [N,T], under the hooks in
    force.

    All continuations have the same length: an end-of-sequence token is never drawn. Where what is written under the
    hooks feeds back and grows past the dtype, a row is -1 everywhere, and the others are as they would be without it.

    The random numbers depend on `seed`, N and `batch_size` alone, so that continuations under two conditions differ
    only by what the conditions do to the logits. The generators of the process are left as they were.
    """
    device = torch.device(model.cfg.device)
    sampled: list[Tensor] = []
    lost: list[Tensor] = []

    def go_on(input_ids: Tensor, scores: Tensor) -> Tensor:
        """Rows whose logits are no distribution (NaN or +inf) resume from zeros."""
        lost.append((scores.isnan() | scores.isposinf()).any(-1))
        # -inf stays: it says "never drawn", and is how min_new_tokens keeps the end-of-sequence token away.
        return torch.where(lost[-1][:, None] & ~scores.isneginf(), 0.0, scores)

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for start, batch in zip(range(0, len(tokens), batch_size), tokens.split(batch_size)):
            torch.manual_seed(seed + start)  # the same numbers for a batch under every condition
            lost.clear()
            texts = model.generate(
                batch,
                do_sample=True,
                temperature=1.0,
                top_k=0,  # with top_p and the penalty, what a checkpoint's generation_config may set otherwise
                top_p=1.0,
                repetition_penalty=1.0,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                pad_token_id=_pad_token(model),
                logits_processor=LogitsProcessorList([go_on]),  # pyright: ignore[reportArgumentType]
            )
            new = cast(Tensor, texts)[:, tokens.shape[1] :]
            sampled.append(new.masked_fill(torch.stack(lost).any(0)[:, None], -1).cpu())
    return torch.cat(sampled)


def _pad_token(model: HookedRecurrent) -> int:
    """The padding id, which `generate` asks for also where nothing is padded."""
    config = model.hf_model.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return next((token for token in (config.pad_token_id, *ends) if token is not None), 0)
