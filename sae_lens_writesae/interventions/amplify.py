"""Amplify and suppress atoms while the model writes: does the token change that the atom is aligned with?

Source: WriteSAE (arXiv 2605.12770), newline amplification, whose released code pairs token labels with the states at
the ends of sequences; here a label belongs to the token at which an atom fires (or the next one), and atoms are chosen
on text that no prompt is taken from.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_lens_writesae.conditions import norm, random_directions, with_norm
from sae_lens_writesae.errors import NothingToMeasureError
from sae_lens_writesae.evaluation import describe
from sae_lens_writesae.firings import Firings, HeadHook, collect_firings
from sae_lens_writesae.interventions.amplify_result import Amplify, AmplifyConfig
from sae_lens_writesae.interventions.common import checked_hook, column_table, head_atoms, special_tokens, token_text
from sae_lens_writesae.interventions.draw import halves, of_sequences
from sae_lens_writesae.interventions.generation import Sampled, sampled
from sae_lens_writesae.progress import bar
from sae_lens_writesae.steering import scale_atoms, token_id

GREW = "prompts after which a scaled continuation grew past the dtype, all their conditions"


class Alignment(NamedTuple):
    """How well each of F atoms fires where a token is."""

    both: NDArray[np.int64]  # [F] firings at the token
    fired: NDArray[np.int64]  # [F] firings
    present: int  # places of the token
    phi: NDArray[np.float64]  # [F] correlation of firing and token; 0 where one of them never or always is


@torch.no_grad()
def run_amplify(
    model: Any, sae: Any, tokens: Tensor, config: AmplifyConfig | None = None, progress: bool = True
) -> Amplify:
    """Scale atoms in continuations of sequences [N,T] that neither model nor SAE was trained on.

    Cost: N forwards up to the SAE's layer, and 1 + 2 * tokens * factors sampled continuations of every prompt.

    Raises:
        ValueError: an SAE of another head or model, sequences too short, a string of several tokens, or a token asked
            for that has no atom.
        NothingToMeasureError: too few sequences, or tokens that occur often enough and have an atom that fires at them;
            or the scaled writes grow past the dtype after all prompts but one.
    """
    begin, config = time.perf_counter(), config or AmplifyConfig()
    hook = checked_hook(model, sae, tokens, config.prompt_tokens)
    split = halves(len(tokens), config.seed)
    asked = [token_id(model, token) for token in config.tokens]
    firings = collect_firings(model, sae, tokens, progress=progress)
    chosen = choose_atoms(model, _labelled(firings, tokens, split.select, config), asked, config)
    sequences = split.test[: config.prompts]
    run = _Run(model, sae, hook, tokens[sequences, : config.prompt_tokens], chosen, config)
    conditions = list(_conditions(run))
    tallies, fires, finite = _tallied(run, conditions, progress)
    if finite.sum() < 2:
        raise NothingToMeasureError(
            f"after {len(finite) - finite.sum()} of {len(finite)} prompts what the scaled atoms write feeds back and "
            f"grows past {str(model.cfg.dtype).removeprefix('torch.')}; scale less (factors: {config.factors})"
        )
    table = _table(run, tallies, fires).assign(sequence=lambda t: sequences[t["prompt"].to_numpy()])
    table = table[finite[table["prompt"].to_numpy()]].reset_index(drop=True)
    table["text"] = [token_text(model, token) for token in table["token"]]
    atoms = _atoms(model, chosen, *(_labelled(firings, tokens, side, config) for side in split))
    seconds = time.perf_counter() - begin
    count = {"conditions": len(conditions) * len(sequences)}
    settings = {"config": asdict(config), "omitted": {GREW: int((~finite).sum())}} | count
    split_text = "half of the sequences, at random, for the choice of atoms; prompts begin sequences of the other half"
    info = describe(model, sae, label=config.label, seed=config.seed, seconds=seconds, split=split_text, **settings)
    return Amplify(info, {"atoms": atoms, "counts": pd.DataFrame(table, columns=list(Amplify.COLUMNS["counts"]))})


class _Labelled(NamedTuple):
    """Places of one half of the sequences, and the firings there."""

    labels: NDArray[np.int64]  # token of each place, flat
    atom: NDArray[np.int64]  # of each firing
    label: NDArray[np.int64]  # token at each firing
    n_atoms: int


def _labelled(firings: Firings, tokens: Tensor, sequences: NDArray[np.int64], config: AmplifyConfig) -> _Labelled:
    ids = tokens.cpu().numpy()
    labels = ids if config.aligned == "current" else ids[:, 1:]
    part = of_sequences(firings, sequences)
    inside = part.position < labels.shape[1]
    at = labels[part.sequence[inside], part.position[inside]]
    return _Labelled(labels[sequences].ravel(), part.atom[inside], at, part.n_atoms)


def alignment(places: _Labelled, token: int) -> Alignment:
    """Correlation (phi) of every atom's firing with a token."""
    fired = np.bincount(places.atom, minlength=places.n_atoms)
    both = np.bincount(places.atom[places.label == token], minlength=places.n_atoms)
    n, present = len(places.labels), int((places.labels == token).sum())
    spread = np.sqrt(fired.astype(float) * (n - fired) * present * (n - present))
    phi = np.where(spread > 0, (both * float(n) - fired * float(present)) / np.maximum(spread, 1), 0.0)
    return Alignment(both, fired, present, phi)


def choose_atoms(model: Any, places: _Labelled, asked: Sequence[int], config: AmplifyConfig) -> dict[int, int]:
    """The atom of each token: those asked for, in order, or the tokens whose atoms are aligned best. No atom twice.

    Raises ValueError where a token asked for has none, or fewer than two tokens do.
    """
    names, counts = np.unique(places.labels, return_counts=True)
    often = set(names[counts >= config.min_count].tolist()) - (set() if asked else special_tokens(model))
    found = {token: alignment(places, token) for token in (asked or sorted(often))}
    able = {token: np.where(own.both >= config.min_firings, own.phi, -1.0) for token, own in found.items()}
    chosen: dict[int, int] = {}
    for token in asked or sorted(able, key=lambda token: -able[token].max()):
        best = able[token].copy()
        if asked:
            best[list(chosen.values())] = -1.0
        atom = int(best.argmax())
        if token in often and best[atom] > 0 and atom not in chosen.values():
            chosen[token] = atom
        elif asked:
            own = found[token]
            raise ValueError(
                f"token {token_text(model, token)!r} occurs {own.present} times in the selection half (needed: "
                f"{config.min_count}) and no atom left for it fires there {config.min_firings} times (most: "
                f"{int(own.both.max())}); give more sequences, or lower min_count and min_firings"
            )
        if len(chosen) == (len(asked) or config.n_tokens):
            break
    if len(chosen) < 2:
        raise NothingToMeasureError(
            f"{len(often)} tokens occur {config.min_count} times in the selection half, and {len(chosen)} of them have "
            f"an atom that fires at them {config.min_firings} times; two are needed. Give more sequences, or lower "
            "min_count and min_firings"
        )
    return chosen


class _Condition(NamedTuple):
    """Whose atom is scaled, and how."""

    name: str
    factor: float
    token: int | None


class _Run(NamedTuple):
    """What stays the same over conditions."""

    model: Any
    sae: Any
    hook: HeadHook
    prompts: Tensor  # [P,T]
    chosen: dict[int, int]  # token -> atom
    config: AmplifyConfig


def _conditions(run: _Run) -> Iterator[_Condition]:
    yield _Condition("nothing", 1.0, None)
    for factor in run.config.factors:
        for token in run.chosen:
            yield _Condition("atom", factor, token)
            yield _Condition("random", factor, token)


def _tallied(
    run: _Run, conditions: Sequence[_Condition], progress: bool
) -> tuple[dict[_Condition, NDArray[np.int64]], NDArray[np.float64], NDArray[np.bool_]]:
    """[P,tokens] counts of each token under each condition; `_fires`; [P] whether no condition's logits grew past the
    dtype."""
    tallies: dict[_Condition, NDArray[np.int64]] = {}
    fires = np.zeros((len(run.prompts), len(run.chosen)))
    finite = np.ones(len(run.prompts), dtype=bool)
    for condition in bar(conditions, "amplify", progress):
        new = _continued(run, condition)
        tallies[condition] = (new.tokens[..., None] == torch.tensor(list(run.chosen))).sum(1).numpy()
        finite &= new.finite.numpy()
        if condition.token is None:
            fires = _fires(run, new.tokens)
    return tallies, fires, finite


def _continued(run: _Run, condition: _Condition) -> Sampled:
    """Continuations of every prompt."""
    scope: Any = nullcontext()
    if condition.token is not None:
        atom, like = run.chosen[condition.token], None
        if condition.name == "random":
            own = head_atoms(run.model, run.sae, run.hook, [atom])
            noise = random_directions(own, torch.Generator().manual_seed(run.config.seed + condition.token))
            like = with_norm(noise, norm(own))
        scope = scale_atoms(run.model, run.sae, [atom], condition.factor, like=like)
    with scope:
        return sampled(
            run.model, run.prompts, run.config.new_tokens, run.config.seed, batch_size=run.config.rows_per_run
        )


def _fires(run: _Run, new: Tensor) -> NDArray[np.float64]:
    """[P,tokens]: new tokens of the unedited continuations at which each token's atom fires."""
    whole = torch.cat([run.prompts.cpu(), new], 1)
    firings = collect_firings(run.model, run.sae, whole)
    late = firings.position >= run.prompts.shape[1]
    per_atom = [
        np.bincount(firings.sequence[late & (firings.atom == i)], minlength=len(new)) for i in run.chosen.values()
    ]
    return np.stack(per_atom, 1).astype(float)


def _table(run: _Run, tallies: dict[_Condition, NDArray[np.int64]], fires: NDArray[np.float64]) -> pd.DataFrame:
    """Counts of every token under every condition that is about it."""
    nothing = next(tally for condition, tally in tallies.items() if condition.token is None)
    parts = []
    for column, token in enumerate(run.chosen):
        counts = {("nothing", 1.0): nothing[:, column]}
        for factor in run.config.factors:
            counts |= {
                (name, factor): tallies[_Condition(name, factor, token)][:, column] for name in ("atom", "random")
            }
            others = [tallies[_Condition("atom", factor, t)][:, column] for t in run.chosen if t != token]
            counts["other", factor] = np.mean(others, axis=0)
        for (name, factor), count in counts.items():
            described = {"token": token, "condition": name, "factor": factor, "fires": fires[:, column]}
            parts.append(pd.DataFrame({"prompt": np.arange(len(count)), "count": count.astype(float), **described}))
    return pd.concat(parts, ignore_index=True)


def _atoms(model: Any, chosen: dict[int, int], select: _Labelled, test: _Labelled) -> pd.DataFrame:
    """How well each token's atom fits, on both halves."""
    rows = []
    for token, atom in chosen.items():
        own, other = alignment(select, token), alignment(test, token)
        described = {"token": token, "text": token_text(model, token), "atom": atom, "count": own.present}
        fits = {"phi": own.phi[atom], "phi_test": other.phi[atom]}
        shares = {
            "precision": other.both[atom] / max(other.fired[atom], 1),
            "recall": other.both[atom] / max(other.present, 1),
        }
        rows.append(described | fits | shares)
    return column_table(rows, Amplify.COLUMNS["atoms"])
