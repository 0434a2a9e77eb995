"""Install a token: add writes toward it at the last tokens of a prompt; does it appear in the greedy continuation?

Source: WriteSAE (arXiv 2605.12770), the three-position install. The paper's rates are exact thirds of 300, that is, 100
units were counted three times; here the unit is an independent pair of a prompt and a target.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hookpoints import WriteEdit
from sae_lens_writesae.errors import NothingToMeasureError
from sae_lens_writesae.evaluation import describe
from sae_lens_writesae.firings import HeadHook
from sae_lens_writesae.head_memory import HeadWrites, head_writes
from sae_lens_writesae.interventions.common import checked_hook, column_table, token_text
from sae_lens_writesae.interventions.generation import greedy_rows
from sae_lens_writesae.interventions.install_result import SEMANTIC, STRATA, Install, InstallConfig
from sae_lens_writesae.interventions.targets import Directions, Drawn, Strata, Stratum, draw_target, random_unit
from sae_lens_writesae.steering import token_id


class _Pair(NamedTuple):
    """One prompt and its target."""

    sequence: int
    prompt: Tensor  # [P]
    stratum: str
    drawn: Drawn
    writes: HeadWrites
    logits: Tensor  # [vocab], native, after the prompt


@torch.no_grad()
def run_install(
    model: Any, sae: Any, tokens: Tensor, config: InstallConfig | None = None, progress: bool = True
) -> Install:
    """Install tokens through the head that `sae` reads (its atoms are not used) on prompts from `tokens` [N,T].

    Cost: for each pair one forward of the prompt and 1 + 2 * sizes continuations of `new_tokens`.

    Raises:
        ValueError: an SAE of another model, sequences too short, a semantic target of several tokens, too few prompts.
    """
    begin, config = time.perf_counter(), config or InstallConfig()
    hook = checked_hook(model, sae, tokens, config.prompt_tokens)
    pairs, omitted = _pairs(model, hook, tokens, config)
    directions = Directions(model, hook.layer, hook.head)
    rows, prompts, edits = [], [], []
    for n, pair in enumerate(pairs):
        rng = np.random.default_rng([config.seed, 3, n])
        target, noise = directions(pair.drawn.token), random_unit(directions(pair.drawn.token), rng)
        made: list[tuple[str, float, Sequence[WriteEdit]]] = [("nothing", 0.0, [])]
        for m in config.sizes:
            for name, value in (("target", target), ("random", noise)):
                made.append((name, m, install_edits(hook, pair.writes, value, m, config.n_positions)))
        described = {"pair": n, "sequence": pair.sequence, "stratum": pair.stratum, "token": pair.drawn.token}
        described |= {"text": token_text(model, pair.drawn.token), "rank": pair.drawn.rank, "wrong": pair.drawn.wrong}
        changes = _first_token(model, pair, [row for *_, row in made[1:]])
        for (name, m, row), change in zip(made, [0.0, *changes]):
            rows.append(described | {"condition": name, "m": m, "log_prob_change": change})
            prompts.append(pair.prompt)
            edits.append(row)
    found = greedy_rows(
        model, torch.stack(prompts), edits, config.new_tokens, batch_size=config.rows_per_run, progress=progress
    )
    for row, continuation in zip(rows, found):
        row["hit"], row["wrong_hit"] = row["token"] in continuation, row["wrong"] in continuation
        row["first"] = continuation.index(row["token"]) if row["hit"] else -1
    table = column_table(rows, Install.COLUMNS["continuations"])
    seconds = time.perf_counter() - begin
    settings = {"config": asdict(config), "omitted": omitted, "conditions": len(rows)}
    return Install(
        describe(model, sae, label=config.label or hook.cell, seed=config.seed, seconds=seconds, **settings),
        {"continuations": table},
    )


def install_edits(hook: HeadHook, writes: HeadWrites, value: Tensor, size: float, n_positions: int) -> list[WriteEdit]:
    """Add size |W_t| k_t value^T / |k_t| at the last `n_positions` of the prompt whose native writes are `writes`."""
    keys, values = writes.native.keys[:, 0], writes.native.values[:, 0]
    made = []
    for t in range(len(keys) - n_positions, len(keys)):
        norm = keys[t].norm() * values[t].norm()
        unit = torch.nn.functional.normalize(keys[t], dim=0)
        made.append(WriteEdit(hook.layer, hook.head, t, unit, size * norm * value.to(values)))
    return made


def _pairs(model: Any, hook: HeadHook, tokens: Tensor, config: InstallConfig) -> tuple[list[_Pair], dict[str, int]]:
    """`config.pairs` pairs of each stratum, every one with a prompt of its own, prompts dealt over sequences."""
    rng = np.random.default_rng([config.seed, 2])
    strata: Strata = [(s, None) for s in STRATA]
    if config.semantic:
        strata.append((Stratum(SEMANTIC, 1, None), [token_id(model, t) for t in config.semantic]))
    per_sequence = tokens.shape[1] // config.prompt_tokens
    windows = [
        (n, w * config.prompt_tokens) for w in rng.permutation(per_sequence) for n in rng.permutation(len(tokens))
    ]
    needed = config.pairs * len(strata)
    if len(windows) < needed:
        raise NothingToMeasureError(
            f"{len(strata)} strata x {config.pairs} pairs need {needed} prompts of {config.prompt_tokens} tokens, the "
            f"text gives {len(windows)}; give more sequences, or lower pairs"
        )
    pairs: list[_Pair] = []
    omitted = {"pairs whose stratum is not in the vocabulary": 0}
    for place, (sequence, start) in enumerate(windows[:needed]):
        stratum, among = strata[place % len(strata)]
        prompt = tokens[sequence, start : start + config.prompt_tokens]
        session = model.edit_session(prompt[None])
        drawn = draw_target(model, session.logits[0, -1], stratum, rng, among)
        if drawn is None:
            omitted["pairs whose stratum is not in the vocabulary"] += 1
            continue
        writes = head_writes(session.recurrence(hook.layer), hook.head, "additive")
        pairs.append(_Pair(int(sequence), prompt, stratum.name, drawn, writes, session.logits[0, -1]))
    spread = pd.Series({n: pair.stratum for n, pair in enumerate(pairs)}, dtype=object)
    lone = [s for s, own in spread.groupby(spread) if len({pairs[n].sequence for n in own.index}) < 2]
    omitted["pairs of a stratum with prompts of one sequence only"] = int(spread.isin(lone).sum())
    pairs = [pair for pair in pairs if pair.stratum not in lone]
    if not pairs:
        raise NothingToMeasureError(
            f"no stratum has tokens and two sequences: vocabulary {model.W_U.shape[1]}, {len(tokens)} sequences"
        )
    return pairs, omitted


def _first_token(model: Any, pair: _Pair, rows: list[Sequence[WriteEdit]]) -> list[float]:
    """Change of the target's log-probability at the first new token under each row of edits, nats."""
    run = model.run_with_edits(pair.prompt[None], rows)
    native = pair.logits.float().log_softmax(-1)[pair.drawn.token]
    return (run.logits[:, -1].float().log_softmax(-1)[:, pair.drawn.token] - native).tolist()
