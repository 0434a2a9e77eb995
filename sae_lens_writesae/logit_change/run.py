"""Predict the change of logits by an atom that is added to a write, make the edit, and compare."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_writesae.conditions import Factors, norm, scaled
from sae_lens_writesae.evaluate import check_fits
from sae_lens_writesae.evaluation import describe
from sae_lens_writesae.firings import HeadHook, atom_factors, collect_firings
from sae_lens_writesae.head_memory import HeadWrites, head_writes
from sae_lens_writesae.logit_change.config import LogitChangeConfig, rank_name
from sae_lens_writesae.logit_change.measure import measure
from sae_lens_writesae.logit_change.predictors import PREDICTORS, ReadGradients, predict
from sae_lens_writesae.logit_change.result import LogitChange
from sae_lens_writesae.logit_change.scores import score, score_cells, with_control
from sae_lens_writesae.logit_change.targets import Targets, check_vocabulary, choose
from sae_lens_writesae.substitution_config import SubstitutionConfig
from sae_lens_writesae.substitution_draw import Sample, draw

ZERO_WRITE = "the native write is zero, so that eps has no unit"
ZERO_ATOM = "the atom is zero and has no direction"


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
    with torch.inference_mode(False):
        sample = _sample(model, sae, tokens, config, progress)
        subject = _Subject(model, sae, hook, config, (model.W_O(hook.layer, hook.head) @ model.W_U).detach())
        groups = list(sample.table.groupby("sequence"))
        parts = [_sequence(subject, tokens, part) for _, part in tqdm(groups, "logit change", disable=not progress)]
    omitted = {reason: sum(part.omitted[reason] for part in parts) for reason in (ZERO_WRITE, ZERO_ATOM)}
    cells = _joined([part.cells for part in parts], omitted, config)
    tables = {"cells": cells, "scores": score(cells, config.seed), "per_cell": score_cells(cells, config.seed)}
    seconds = time.perf_counter() - begin
    info = describe(
        model,
        sae,
        label=config.label,
        config=config.to_dict(),
        seed=config.seed,
        n_firings=int(cells["firing"].nunique()),
        n_sequences=int(cells["sequence"].nunique()),
        n_atoms=int(cells["atom"].nunique()),
        n_alive=len(sample.alive),
        n_testable=sample.n_testable,
        floor=float(np.quantile(np.concatenate([part.floor for part in parts]), 0.95)),
        omitted=omitted,
        seconds=seconds,
        edits_per_second=len(sample.table) * len(config.eps) / seconds,
    )
    return LogitChange(info, tables)


class _Subject(NamedTuple):
    """What stays the same over all sequences."""

    model: Any
    sae: Any
    hook: HeadHook
    config: LogitChangeConfig
    path: Tensor  # [V,vocab], W_O^h W_U


def _joined(parts: list[pd.DataFrame], omitted: dict[str, int], config: LogitChangeConfig) -> pd.DataFrame:
    """All rows with their control; ValueError where too little is left to say anything."""
    left = [part for part in parts if len(part)]
    if len(left) < 2:
        raise ValueError(
            f"firings that could be measured lie in {len(left)} sequence(s), and intervals need two or more; left out: "
            + ", ".join(f"{n} ({why})" for why, n in omitted.items())
        )
    return with_control(pd.concat(left, ignore_index=True), config.seed)


class _Part(NamedTuple):
    """What one sequence gives."""

    cells: pd.DataFrame
    floor: NDArray[np.float64]
    omitted: dict[str, int]


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
    if sample.table["sequence"].nunique() < 2:
        raise ValueError(
            f"{len(sample.table)} firings of {sample.n_testable} atoms, all in one sequence: intervals need firings in "
            f"two or more sequences; give more than {len(tokens)} sequence(s), or more atoms"
        )
    return sample


_SHARED = ("n_atoms", "firings_per_atom", "atoms", "first_position", "alive_tokens", "min_firings", "seed")


def _sequence(subject: _Subject, tokens: Tensor, part: pd.DataFrame) -> _Part:
    """Predictions and measurements of the firings of one sequence."""
    hook, config = subject.hook, subject.config
    sequence = int(part["sequence"].iloc[0])
    session = subject.model.edit_session(tokens[sequence : sequence + 1])
    with torch.no_grad():
        writes = head_writes(session.recurrence(hook.layer), hook.head, "additive")
        one_unit = _one_unit(subject, writes, part)
        part, added = part[one_unit.usable], one_unit.added.rows(torch.tensor(one_unit.usable))
        if part.empty:
            return _Part(pd.DataFrame(), np.empty(0), one_unit.omitted)
        starts = part["position"].tolist()
        targets = choose(session.logits[0], starts, config, sequence)
        measured = measure(session, (hook.layer, hook.head), starts, added, targets, config)
    predicted = _predicted(subject, session, writes, starts, added, targets)
    described = part[["firing", "sequence", "position", "atom"]].assign(unit=norm(added).cpu().numpy().astype(float))
    cells = _table(described, targets, config, {"logit": measured.logit, "log_prob": measured.log_prob}, predicted)
    return _Part(cells, measured.floor.ravel(), one_unit.omitted)


class _Added(NamedTuple):
    added: Factors  # eps = 1 of every firing
    usable: NDArray[np.bool_]
    omitted: dict[str, int]


def _one_unit(subject: _Subject, writes: HeadWrites, part: pd.DataFrame) -> _Added:
    """unit * A_i / |A_i| of every firing; those without a unit or a direction are marked."""
    native = writes.native.rows(part["position"].tolist())
    found = atom_factors(subject.sae, part["written_atom"].to_numpy(), native.keys.shape[-1], native.values.shape[-1])
    atom = Factors(found.keys.to(native.keys), found.values.to(native.values))
    size, activation = norm(atom), torch.tensor(part["activation"].to_numpy()).to(native.values)
    unit = norm(native) if subject.config.unit == "write" else activation * size
    flat, silent = size == 0, (unit == 0) & (size > 0)
    omitted = {ZERO_ATOM: int(flat.sum()), ZERO_WRITE: int(silent.sum())}
    tiny = torch.finfo(size.dtype).tiny
    return _Added(scaled(atom, unit / size.clamp_min(tiny)), (~flat & ~silent).cpu().numpy(), omitted)


def _predicted(
    subject: _Subject, session: Any, writes: HeadWrites, starts: list[int], added: Factors, targets: Targets
) -> dict[str, NDArray[np.float64]]:
    """Predicted changes at eps = 1 by quantity, [n,Z,G,P] in the order of PREDICTORS.

    A log-probability is its logit minus the mean of all logits under the native p, to first order; p is one more
    direction in the space of logits.
    """
    hook = subject.hook
    gradients = ReadGradients(subject.model, session, hook.layer, hook.head, targets.positions.ravel().tolist())
    change = np.empty((*targets.tokens.shape, len(PREDICTORS)))
    common = np.empty((*targets.positions.shape, 1, len(PREDICTORS)))
    for (i, z), position in np.ndenumerate(targets.positions):
        directions = _directions(session.logits[0, position], targets.tokens[i, z].tolist())
        found = [gradients.at(int(position), direction) for direction in directions]
        naive = directions.to(subject.path) @ subject.path.T
        with torch.no_grad():
            made = predict(writes.recurrence, added.rows([i]), starts[i], found, naive)
        values = np.array([[float(value) for value in one] for one in made])
        change[i, z], common[i, z] = values[:-1], values[-1]
    return {"logit": change, "log_prob": change - common}


def _directions(native: Tensor, tokens: list[int]) -> Tensor:
    """One row [vocab] per token that picks its logit, and a last one with the native probabilities."""
    probabilities = native.softmax(-1) if native.dtype == torch.float64 else native.float().softmax(-1)
    picks = torch.zeros(len(tokens), len(native)).to(probabilities)
    picks[torch.arange(len(tokens)), torch.tensor(tokens)] = 1
    return torch.cat([picks, probabilities[None]])


def _table(
    firings: pd.DataFrame,
    targets: Targets,
    config: LogitChangeConfig,
    measured: dict[str, NDArray[np.float64]],
    predicted: dict[str, NDArray[np.float64]],
) -> pd.DataFrame:
    """Tidy rows: one per quantity, firing, eps, horizon and rank group."""
    i, e, z, g = (index.ravel() for index in np.indices(measured["logit"].shape))
    eps = np.array(config.eps)[e]
    frames = []
    for quantity, values in measured.items():
        rows = (
            firings.iloc[i]
            .reset_index(drop=True)
            .assign(
                quantity=quantity,
                horizon=np.array(config.horizons)[z],
                rank=np.array([rank_name(group) for group in config.ranks])[g],
                token=targets.tokens[i, z, g],
                native_rank=targets.ranks[i, z, g],
                eps=eps,
                measured=values.ravel(),
            )
        )
        own = predicted[quantity][i, z, g]
        frames.append(rows.assign(**{name: eps * own[:, p] for p, name in enumerate(PREDICTORS)}))
    return pd.concat(frames, ignore_index=True)
