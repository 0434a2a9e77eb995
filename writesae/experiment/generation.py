"""Continuations of many prompts at once: greedy ones in which each row has edits of its own, and sampled ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

from hookpoints import EditRow, HookedRecurrent


class Sampled(NamedTuple):
    """Sampled continuations of N prompts."""

    tokens: Tensor
    """[N,new_tokens], on the CPU."""
    finite: Tensor
    """[N] bool. False: at some token the logits were NaN or infinite, and what follows means nothing."""


@torch.no_grad()
def greedy_rows(
    model: HookedRecurrent,
    tokens: Tensor,
    rows: Sequence[EditRow],
    max_new_tokens: int,
    *,
    batch_size: int = 128,
    progress: bool = False,
) -> list[list[int]]:
    """The greedy continuation of each prompt in `tokens` [N,T] under the edits in `rows` [N].

    Positions of edits count from the first prompt token; an empty row continues without edits. A continuation ends
    before its first end-of-sequence token.

    Raises:
        EditError: an edit does not fit the model, or generation ended before its position.
        ValueError: the number of rows is not the number of prompts.
    """
    if len(tokens) != len(rows):
        raise ValueError(f"each prompt needs its row of edits (empty for none), found {len(tokens)} and {len(rows)}")
    continuations: list[list[int]] = []
    ends = set(_end_tokens(model))
    starts = range(0, len(rows), batch_size)
    for start in tqdm(starts, desc="generate") if progress else starts:
        batch = slice(start, start + batch_size)
        how = {"edit_rows": rows[batch], "max_new_tokens": max_new_tokens, "do_sample": False}
        whole = cast(Tensor, model.generate(tokens[batch], **how, pad_token_id=_pad_token(model)))
        for row in whole[:, tokens.shape[1] :].tolist():
            stop = next((n for n, token in enumerate(row) if token in ends), len(row))
            continuations.append(row[:stop])
    return continuations


@torch.no_grad()
def sample_continuations(
    model: HookedRecurrent, tokens: Tensor, new_tokens: int, seed: int, *, batch_size: int = 128
) -> Sampled:
    """Tokens sampled at temperature 1 after prompts `tokens` [N,T], under the hooks in force.

    All continuations have the same length: an end-of-sequence token is never drawn. Where what is written under the
    hooks feeds back and grows past the dtype, a continuation is marked as not finite, and the others are as they would
    be without it.

    The random numbers depend on `seed`, N and `batch_size` alone, so that continuations under two conditions differ
    only by what the conditions do to the logits. The generators of the process are left as they were.
    """
    device = torch.device(model.cfg.device)
    sampled, finite = [], []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for start in range(0, len(tokens), batch_size):
            torch.manual_seed(seed + start)
            batch = tokens[start : start + batch_size]
            guard = _FiniteLogits(torch.ones(len(batch), dtype=torch.bool, device=device))
            whole = model.generate(
                batch,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                pad_token_id=_pad_token(model),
                logits_processor=LogitsProcessorList([guard]),
            )
            sampled.append(cast(Tensor, whole)[:, tokens.shape[1] :].cpu())
            finite.append(guard.finite.cpu())
    return Sampled(torch.cat(sampled), torch.cat(finite))


class _FiniteLogits(LogitsProcessor):
    """Notes which rows' logits are no distribution (NaN or +inf), and lets those rows go on from zeros."""

    def __init__(self, finite: Tensor):
        self.finite = finite
        """[N] bool, of the rows so far."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        lost = (scores.isnan() | scores.isposinf()).any(-1)
        self.finite = self.finite & ~lost.to(self.finite.device)
        # -inf stays: it says "never drawn", and is how min_new_tokens keeps the end-of-sequence token away.
        return torch.where(lost[:, None] & ~scores.isneginf(), 0.0, scores)


def _end_tokens(model: HookedRecurrent) -> list[int]:
    ends = model.hf_model.generation_config.eos_token_id
    return list(ends) if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]


def _pad_token(model: HookedRecurrent) -> int:
    """The padding id, which `generate` asks for also where nothing is padded."""
    pad = model.hf_model.generation_config.pad_token_id
    return pad if pad is not None else next(iter(_end_tokens(model)), 0)
