"""The sign test: add a write toward a token at one position; does the token's logit move as the formulas say?

Source: WriteSAE (arXiv 2605.12770). The formulas F0 and F2 are those of `logit_change`; no number in them is fitted.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hookpoints import WriteEdit
from sae_lens_writesae.conditions import Factors
from sae_lens_writesae.errors import NothingToMeasureError
from sae_lens_writesae.evaluation import describe
from sae_lens_writesae.firings import HeadHook
from sae_lens_writesae.head_memory import head_writes
from sae_lens_writesae.interventions.common import checked_hook, token_text, windows
from sae_lens_writesae.interventions.sign_result import DIRECTIONS, Sign, SignConfig
from sae_lens_writesae.interventions.targets import Directions, Strata, Stratum, draw_target, random_unit
from sae_lens_writesae.experiment.predictors import ReadGradients, predict
from sae_lens_writesae.progress import bar
from sae_lens_writesae.steering import token_id


class _Aim(NamedTuple):
    """One target at one position: what is written (n rows) and what is predicted."""

    described: dict[str, Any]
    directions: list[str]
    sizes: list[float]
    added: Factors
    f0: Tensor
    f2: Tensor
    aimed: Tensor


@torch.no_grad()
def run_sign(model: Any, sae: Any, tokens: Tensor, config: SignConfig | None = None, progress: bool = True) -> Sign:
    """Write toward tokens through the head that `sae` reads (its atoms are not used), on sequences [N,T].

    Cost: for each sequence one session and one forward with gradients from the head's layer on; for each position and
    target one backward pass and 8 * sizes edited rows of one or two tokens.

    Raises:
        ValueError: an SAE of another model, or sequences too short.
    """
    begin, config = time.perf_counter(), config or SignConfig()
    hook = checked_hook(model, sae, tokens, config.first_position + 2)
    frames: list[pd.DataFrame] = []
    among = [token_id(model, target) for target in config.targets]
    strata: Strata = [(Stratum("", *ends), None) for ends in config.ranks]
    if among:
        strata = [(Stratum("", 1, None), among)]
    omitted = {"targets whose ranks are not in the vocabulary": 0, "positions with a zero write": 0}
    directions = Directions(model, hook.layer, hook.head)
    for sequence, positions in bar(_positions(tokens, config), "sign", progress):
        run = _Sequence(model, hook, tokens[[sequence]], sequence, positions, directions, strata)
        frames += _measured(run, config, omitted)
    if not frames:
        raise NothingToMeasureError(f"no position could be written at: {omitted}")
    table = pd.DataFrame(pd.concat(frames, ignore_index=True), columns=list(Sign.COLUMNS["writes"]))
    seconds = time.perf_counter() - begin
    settings = {"config": asdict(config), "omitted": omitted, "conditions": len(table)}
    return Sign(
        describe(model, sae, label=config.label or hook.cell, seed=config.seed, seconds=seconds, **settings),
        {"writes": table},
    )


def _positions(tokens: Tensor, config: SignConfig) -> list[tuple[int, list[int]]]:
    """Positions of each sequence: as evenly spread over sequences as can be, uniform within."""
    rng = np.random.default_rng([config.seed, 4])
    able = np.arange(config.first_position, tokens.shape[1] - 1)
    share = np.full(len(tokens), config.n_positions // len(tokens))
    share[rng.permutation(len(tokens))[: config.n_positions % len(tokens)]] += 1
    drawn = [(n, np.sort(rng.choice(able, min(k, len(able)), replace=False)).tolist()) for n, k in enumerate(share)]
    return [(n, positions) for n, positions in drawn if positions]


class _Sequence(NamedTuple):
    """One sequence and where it is written to."""

    model: Any
    hook: HeadHook
    tokens: Tensor  # [1,T]
    number: int
    positions: list[int]
    directions: Directions
    strata: Strata


def _measured(run: _Sequence, config: SignConfig, omitted: dict[str, int]) -> list[pd.DataFrame]:
    """All writes at the positions of one sequence."""
    model, hook, tokens, sequence, positions, directions, strata = run
    session = model.edit_session(tokens)
    writes = head_writes(session.recurrence(hook.layer), hook.head, "additive")
    delay = int(writes.recurrence.read_before_write)
    gradients = ReadGradients(model, session, hook.layer, hook.head, [t + delay for t in positions])
    frames = []
    for t in positions:
        rng = np.random.default_rng([config.seed, 5, sequence, t])
        aims = []
        size = float(writes.native.keys[t].norm() * writes.native.values[t].norm())
        if size == 0:
            omitted["positions with a zero write"] += 1
            continue
        for stratum, among in strata:
            drawn = draw_target(model, session.logits[0, t + delay], stratum, rng, among)
            if drawn is None:
                omitted["targets whose ranks are not in the vocabulary"] += 1
                continue
            described: dict[str, Any] = {"sequence": sequence, "position": t, "token": drawn.token, "rank": drawn.rank}
            described["text"] = token_text(model, drawn.token)
            one_hot = torch.nn.functional.one_hot(torch.tensor(drawn.token), session.logits.shape[-1])
            gradient = gradients.at(t + delay, one_hot.to(session.logits))
            aims.append(_aim(model, hook, writes, t, size, drawn, described, gradient, directions, rng, config))
        if aims:
            frames += _measure(session, hook, t, delay, aims, config)
    return frames


def _aim(
    model: Any,
    hook: HeadHook,
    writes: Any,
    t: int,
    size: float,
    drawn: Any,
    described: dict[str, Any],
    gradient: Any,
    directions: Directions,
    rng: np.random.Generator,
    config: SignConfig,
) -> _Aim:
    """Rows of one target, with their predictions."""
    own, wrong = directions(drawn.token), directions(drawn.wrong)
    read = gradient.reads[-1]
    steepest = torch.nn.functional.normalize(read, dim=0)
    sides = {"direct": own, "gradient": steepest, "random": random_unit(own, rng), "wrong": wrong}
    sizes = [sign * m for m in config.sizes for sign in (1, -1)]
    key = torch.nn.functional.normalize(writes.native.keys[t, 0], dim=0)
    values = torch.stack([m * size * sides[name].to(key) for name in DIRECTIONS for m in sizes])
    added = Factors(key.expand(len(values), 1, -1), values[:, None])
    naive = torch.stack(
        [model.W_O(hook.layer, hook.head) @ model.W_U[:, token] for token in (drawn.token, drawn.wrong)]
    )
    own_terms, wrong_terms = predict(writes.recurrence, added, t, [gradient, gradient], naive)
    names = [name for name in DIRECTIONS for _ in sizes]
    is_wrong = torch.tensor([name == "wrong" for name in names], device=own_terms.F0.device)
    aimed = torch.where(is_wrong, wrong_terms.F0, own_terms.F0).sign()
    return _Aim(described, names, sizes * len(DIRECTIONS), added, own_terms.F0, own_terms.F2, aimed)


def _measure(
    session: Any, hook: HeadHook, t: int, delay: int, aims: list[_Aim], config: SignConfig
) -> list[pd.DataFrame]:
    """The change of each target's logit under each of its rows."""
    edits = [
        WriteEdit(hook.layer, hook.head, t, keys, values)
        for aim in aims
        for keys, values in zip(aim.added.keys, aim.added.values)
    ]
    tokens = [aim.described["token"] for aim in aims for _ in aim.sizes]
    measured = np.zeros(len(edits))
    for found in windows(session, [t] * len(edits), edits, 1 + delay, config.rows_per_run):
        own = torch.tensor([tokens[n] for n in found.rows], device=found.logits.device)
        native = session.logits[0, t + delay, own]
        measured[found.rows] = (found.logits[:, -1].gather(1, own[:, None])[:, 0] - native).cpu().numpy()
    frames = []
    for aim, values in zip(aims, np.split(measured, len(aims))):
        predicted = {"f0": aim.f0.cpu().numpy(), "f2": aim.f2.cpu().numpy(), "aimed": aim.aimed.cpu().numpy()}
        rows = {"direction": aim.directions, "m": aim.sizes, "measured": values} | predicted
        frames.append(pd.DataFrame(rows).assign(**aim.described))
    return frames
