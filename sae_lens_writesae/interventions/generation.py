"""Batched continuations: greedy ones in which every row has edits of its own, and sampled ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from hookpoints.edits.edit import EditPlan, EditRow
from hookpoints.layer import context as run
from sae_lens_writesae.progress import bar


def generation_settings(model: Any) -> dict[str, Any]:
    """What `generate` needs beside lengths: a padding id where the model names none."""
    config = model.hf_model.generation_config
    pad = config.pad_token_id
    if pad is None:
        ends = config.eos_token_id
        pad = ends[0] if isinstance(ends, (list, tuple)) else ends if ends is not None else 0
    return {"pad_token_id": pad}


@torch.no_grad()
def greedy_rows(
    model: Any,
    tokens: Tensor,
    rows: Sequence[EditRow],
    max_new_tokens: int,
    *,
    batch_size: int = 128,
    progress: bool = False,
) -> list[list[int]]:
    """The greedy continuation of each prompt in `tokens` [N,T] under the edits in `rows` [N], without what follows an
    end-of-sequence token. Positions of edits count from the first prompt token.

    Raises:
        EditError: an edit does not fit the model or never met its token.
        ValueError: not one row of edits for each prompt.
    """
    if len(tokens) != len(rows):
        raise ValueError(f"each prompt needs its row of edits (empty for none), found {len(tokens)} and {len(rows)}")
    found: list[list[int]] = []
    starts = range(0, len(rows), batch_size)
    for start in bar(starts, "generate", progress):
        part = slice(start, start + batch_size)
        plan = EditPlan.for_rows(rows[part])
        model.check_edits(plan)
        with run.scope(model.attachment, plan=plan):
            out = model.generate(
                tokens[part], max_new_tokens=max_new_tokens, do_sample=False, **generation_settings(model)
            )
        idle = plan.idle()
        if idle:
            raise run_error(idle[0])
        found += [cut(row, model) for row in out[:, tokens.shape[1] :].tolist()]
    return found


class Sampled(NamedTuple):
    """Sampled continuations."""

    tokens: Tensor  # [N,new_tokens]
    finite: Tensor  # [N] bool; False: at some token the logits were NaN or infinite, and what follows means nothing


@torch.no_grad()
def sampled(model: Any, tokens: Tensor, new_tokens: int, seed: int, *, batch_size: int = 128) -> Sampled:
    """Tokens sampled at temperature 1 after prompts `tokens` [N,T], all of the same length (an end-of-sequence token is
    never drawn), under the hooks in force. Where what is written under them feeds back and grows past the dtype, a
    continuation is marked as not finite; the others are as they would be without it.

    The random numbers depend on `seed`, N and `batch_size` alone, so that continuations under two conditions differ
    only by what the conditions do to the logits. The generators of the process are left as they were.
    """
    plain = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    device = torch.device(model.cfg.device)
    found, finite = [], []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for start in range(0, len(tokens), batch_size):
            torch.manual_seed(seed + start)
            batch = tokens[start : start + batch_size]
            guard = _Finite(torch.ones(len(batch), dtype=torch.bool, device=device))
            out = model.generate(
                batch,
                **plain,
                **lengths,
                **generation_settings(model),
                logits_processor=LogitsProcessorList([guard]),
            )
            found.append(out[:, tokens.shape[1] :].cpu())
            finite.append(guard.finite.cpu())
    return Sampled(torch.cat(found), torch.cat(finite))


class _Finite(LogitsProcessor):
    """Notes which rows' logits are no distribution, and lets them go on from one that is. (-inf: never drawn.)"""

    def __init__(self, finite: Tensor):
        self.finite = finite  # [N] bool, of the rows so far

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        lost = (scores.isnan() | scores.isposinf()).any(-1)
        self.finite = self.finite & ~lost.to(self.finite.device)
        return torch.where(lost[:, None] & ~scores.isneginf(), 0.0, scores)


def cut(continuation: list[int], model: Any) -> list[int]:
    """The tokens before the first end-of-sequence token."""
    ends = model.hf_model.generation_config.eos_token_id
    known = set(ends) if isinstance(ends, (list, tuple)) else {ends}
    stop = next((n for n, token in enumerate(continuation) if token in known), len(continuation))
    return continuation[:stop]


def run_error(edit: Any) -> Exception:
    """An edit that no pass reached."""
    from hookpoints import EditError

    return EditError(f"an edit at layer {edit.layer}, position {edit.position} never acted: generation ended before it")
