"""One sequence: what its firings are predicted to do, and what they do."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_lens_writesae.conditions import Factors, norm, scaled
from sae_lens_writesae.firings import HeadHook, atom_factors
from sae_lens_writesae.logit_change.config import LogitChangeConfig, rank_name
from sae_lens_writesae.logit_change.measure import measure
from sae_lens_writesae.experiment.predictors import PREDICTORS, ReadGradients, predict
from sae_lens_writesae.logit_change.targets import Targets, choose

ZERO_WRITE = "the native write is zero, so that eps has no unit"
ZERO_ATOM = "the atom is zero and has no direction"


class Subject(NamedTuple):
    """What stays the same over all sequences."""

    model: Any
    sae: Any
    hook: HeadHook
    config: LogitChangeConfig
    path: Tensor  # [V,vocab], W_O^h W_U


class Part(NamedTuple):
    """What one sequence gives."""

    cells: pd.DataFrame
    floor: NDArray[np.float64]
    omitted: dict[str, int]


def sequence_part(subject: Subject, tokens: Tensor, part: pd.DataFrame) -> Part:
    """Predictions and measurements of the firings of one sequence."""
    hook, config = subject.hook, subject.config
    sequence = int(part["sequence"].to_numpy()[0])
    session = subject.model.edit_session(tokens[sequence : sequence + 1])
    with torch.no_grad():
        recurrence = session.recurrence(hook.layer).select(heads=slice(hook.head, hook.head + 1))
        one_unit = _one_unit(subject, recurrence, part)
        part, added = part.loc[one_unit.usable], one_unit.added.rows(torch.tensor(one_unit.usable))
        if part.empty:
            return Part(pd.DataFrame(), np.empty(0), one_unit.omitted)
        starts = part["position"].tolist()
        targets = choose(session.logits[0], starts, config, sequence)
        measured = measure(session, (hook.layer, hook.head), starts, added, targets, config)
    predicted = _predicted(subject, session, recurrence, starts, added, targets)
    described = part[["firing", "sequence", "position", "atom"]].assign(unit=norm(added).cpu().numpy().astype(float))
    cells = _table(described, targets, config, {"logit": measured.logit, "log_prob": measured.log_prob}, predicted)
    return Part(cells, measured.floor.ravel(), one_unit.omitted)


class _Added(NamedTuple):
    added: Factors  # eps = 1 of every firing
    usable: NDArray[np.bool_]
    omitted: dict[str, int]


def _one_unit(subject: Subject, recurrence: Any, part: pd.DataFrame) -> _Added:
    """unit * A_i / |A_i| of every firing; those without a unit or a direction are marked."""
    native = _writes(recurrence, part["position"].tolist())
    found = atom_factors(subject.sae, part["written_atom"].to_numpy(), native.keys.shape[-1], native.values.shape[-1])
    atom = Factors(found.keys.to(native.keys), found.values.to(native.values))
    size, activation = norm(atom), torch.tensor(part["activation"].to_numpy()).to(native.values)
    unit = norm(native) if subject.config.unit == "write" else activation * size
    flat, silent = size == 0, (unit == 0) & (size > 0)
    omitted = {ZERO_ATOM: int(flat.sum()), ZERO_WRITE: int(silent.sum())}
    tiny = torch.finfo(size.dtype).tiny
    return _Added(scaled(atom, unit / size.clamp_min(tiny)), (~flat & ~silent).cpu().numpy(), omitted)


def _writes(recurrence: Any, positions: list[int]) -> Factors:
    """The native writes of one head (B = H = 1); tokens that take R steps write matrices of rank R."""
    keys, values = (side[0, positions, 0].to(recurrence.dtype) for side in (recurrence.k, recurrence.u))
    return Factors(keys, values) if keys.ndim == 3 else Factors(keys[:, None], values[:, None])


def _predicted(
    subject: Subject, session: Any, recurrence: Any, starts: list[int], added: Factors, targets: Targets
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
            made = predict(recurrence, added.rows([i]), starts[i], found, naive)
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
