"""Predict the change of logits by an atom that is added to a write, make the edit, and compare."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sae_lens_writesae.errors import NothingToMeasureError
from sae_lens_writesae.evaluate import check_fits
from sae_lens_writesae.evaluation import describe
from sae_lens_writesae.firings import HeadHook, collect_firings
from sae_lens_writesae.logit_change.config import LogitChangeConfig
from sae_lens_writesae.logit_change.result import LogitChange
from sae_lens_writesae.logit_change.scores import NO_CHANGE, score, score_cells, unscored, with_control
from sae_lens_writesae.logit_change.sequence import ZERO_ATOM, ZERO_WRITE, Subject, sequence_part
from sae_lens_writesae.logit_change.targets import check_vocabulary
from sae_lens_writesae.progress import bar
from sae_lens_writesae.substitution_config import SubstitutionConfig
from sae_lens_writesae.substitution_draw import Sample, draw


def run_logit_change(
    model: Any, sae: Any, tokens: Tensor, config: LogitChangeConfig | None = None, progress: bool = True
) -> LogitChange:
    """Compare three formulas (`predictors`) with real edits, on sequences that neither model nor SAE was trained on.

    At a firing of atom i at token t, `eps * unit * A_i / |A_i|` is added to the write, in closed loop; the logits of
    chosen tokens at t + horizon are predicted and measured.

    Args:
        model: a `HookedRecurrent`.
        sae: reads `blocks.{l}.mixer.heads.{h}.hook_write_vec` or `hook_state_vec` of the model, by its metadata.
        tokens: [N,T] token ids, all sequences of one length, without padding.
        config: what to sample, add and measure.
        progress: show progress bars.

    Cost: N forwards up to the SAE's layer to find firings; per tested firing one short edited row per eps, and one
    backward per horizon and token plus one per horizon (for log-probabilities).

    Raises:
        ValueError: the SAE does not fit the model, the sequences are shorter than the longest horizon, no atom can be
            tested, the firings lie in a single sequence, or a rank exceeds the vocabulary.
    """
    begin = time.perf_counter()
    config = config or LogitChangeConfig()
    check_fits(model, sae, "the SAE given")
    check_vocabulary(config, model.cfg.d_vocab)
    hook = HeadHook.of(sae)
    with torch.inference_mode(False):  # gradients cannot be taken inside of it
        tokens = torch.as_tensor(tokens).clone()
        sample = _sample(model, sae, tokens, config, progress)
        subject = Subject(model, sae, hook, config, _direct_path(model, hook))
        groups = list(sample.table.groupby("sequence"))
        parts = [sequence_part(subject, tokens, part) for _, part in bar(groups, "logit change", progress)]
    omitted = {reason: sum(part.omitted[reason] for part in parts) for reason in (ZERO_WRITE, ZERO_ATOM)}
    cells = _joined([part.cells for part in parts], omitted, config)
    tables = {"cells": cells, "scores": score(cells, config.seed), "per_cell": score_cells(cells, config.seed)}
    omitted[NO_CHANGE] = unscored(cells, tables["scores"])
    seconds = time.perf_counter() - begin
    counts = {f"n_{name}s": len(np.unique(cells[name])) for name in ("firing", "sequence", "atom")}
    info = describe(
        model,
        sae,
        label=config.label,
        config=config.to_dict(),
        seed=config.seed,
        **counts,
        n_alive=len(sample.alive),
        n_testable=sample.n_testable,
        floor=float(np.quantile(np.concatenate([part.floor for part in parts]), 0.95)),
        omitted=omitted,
        seconds=seconds,
        conditions=len(sample.table) * len(config.eps),
    )
    return LogitChange(info, tables)


@torch.no_grad()
def _direct_path(model: Any, hook: HeadHook) -> Tensor:
    """W_O^h W_U, [V,vocab], in float32 at least."""
    out, unembed = model.W_O(hook.layer, hook.head), model.W_U
    dtype = torch.promote_types(out.dtype, torch.float32)
    return out.to(dtype) @ unembed.to(out.device, dtype)


def _joined(parts: list[pd.DataFrame], omitted: dict[str, int], config: LogitChangeConfig) -> pd.DataFrame:
    """All rows with their control; ValueError where too little is left to say anything."""
    left = [part for part in parts if len(part)]
    if len(left) < 2:
        raise NothingToMeasureError(
            f"firings that could be measured lie in {len(left)} sequence(s), and intervals need two or more; left out: "
            + ", ".join(f"{n} ({why})" for why, n in omitted.items())
        )
    return with_control(pd.concat(left, ignore_index=True), config.seed)


def _sample(model: Any, sae: Any, tokens: Tensor, config: LogitChangeConfig, progress: bool) -> Sample:
    """The draw of the substitution test, with room for the longest horizon."""
    horizon = max(config.horizons)
    shortest = config.first_position + horizon + 1
    if tokens.ndim != 2 or tokens.shape[1] < shortest:
        found = list(tokens.shape)
        raise ValueError(f"tokens must be [N,T] with T >= {shortest} (longest horizon {horizon}), found {found}")
    shared = {name: getattr(config, name) for name in _SHARED}
    sample = draw(
        collect_firings(model, sae, tokens, progress=progress), SubstitutionConfig(**shared, horizon=max(1, horizon))
    )
    if len(np.unique(sample.table["sequence"])) < 2:
        raise NothingToMeasureError(
            f"{len(sample.table)} firings of {sample.n_testable} atoms, all in one sequence: intervals need firings in "
            f"two or more sequences; give more than {len(tokens)} sequence(s), or more atoms"
        )
    return sample


_SHARED = ("n_atoms", "firings_per_atom", "atoms", "first_position", "alive_tokens", "min_firings", "seed")
