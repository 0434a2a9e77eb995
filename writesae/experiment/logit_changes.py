"""Changes of chosen logits after something is added to a write: read from edited runs, and predicted by formulas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_lens_writesae.atom.low_rank import LowRank
from writesae.experiment.lab import EditedRows, Lab, Readout, Site
from writesae.experiment.predictors import PREDICTORS, ReadGradients, predict
from writesae.verdict.statistics import Array


class Targets(NamedTuple):
    """Tokens to predict for the n firings of one sequence: the axes are n firings, Z horizons, G rank groups."""

    positions: NDArray[np.int64]
    """[n,Z], t + horizon."""
    tokens: NDArray[np.int64]
    """[n,Z,G] token ids."""
    ranks: NDArray[np.int64]
    """[n,Z,G] their native rank at that position, from 1."""


def choose_targets(
    native: Tensor,
    starts: Sequence[int],
    horizons: Sequence[int],
    ranks: Sequence[tuple[int, int]],
    rng: np.random.Generator,
) -> Targets:
    """One token of each rank group (lowest, highest) at every horizon of every firing, uniform within the group.

    `native` [T,vocab] are the logits without edits.
    """
    positions = np.array(starts)[:, None] + np.array(horizons)
    low, high = np.array(ranks).T
    drawn = rng.integers(low, high + 1, (*positions.shape, len(low)))
    distinct, which = np.unique(positions, return_inverse=True)
    best = native[torch.tensor(distinct)].topk(int(high.max())).indices.cpu().numpy()
    return Targets(positions, best[which.reshape(positions.shape)[..., None], drawn - 1], drawn)


def direct_path(lab: Lab) -> Tensor:
    """W_O^h W_U, [V,vocab], in float32 at least."""
    out, unembed = lab.model.layer_W_O(lab.hook.layer)[lab.hook.head], lab.model.W_U
    dtype = torch.promote_types(out.dtype, torch.float32)
    return out.to(dtype) @ unembed.to(out.device, dtype)


def measured_changes(targets: Targets) -> Readout:
    """Per trial [Z,G]: `logit` and `log_prob`, changes against the run without edits of the same batch, and `floor`,
    the distance of that run from the plain pass. A trial names its firing as `index`; `Lab.read` needs `plain=True`."""

    def read(rows: EditedRows) -> Mapping[str, Array]:
        assert rows.plain is not None
        index = np.array([trial.row["index"] for trial in rows.trials])
        positions = torch.tensor(targets.positions[index], device=rows.logits.device)  # [n,Z]
        tokens = torch.tensor(targets.tokens[index], device=rows.logits.device)
        each = torch.arange(len(index), device=rows.logits.device)[:, None]
        edited = _looked_up(rows.logits[each, positions - rows.start], tokens)
        unedited = _looked_up(rows.plain[positions - rows.start], tokens)
        plain = _looked_up(rows.native[positions], tokens)
        changes = {name: edited[name] - unedited[name] for name in edited}
        changes["floor"] = (unedited["logit"] - plain["logit"]).abs()
        return {name: change.cpu().numpy() for name, change in changes.items()}

    return read


def _looked_up(logits: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Logits and log-probabilities of `tokens` [n,Z,G], from logits [n,Z,vocab], in float64."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    logit = wide.gather(-1, tokens).double()
    return {"logit": logit, "log_prob": logit - wide.logsumexp(-1, keepdim=True).double()}


def predicted_changes(
    lab: Lab, site: Site, path: Tensor, starts: Sequence[int], added: LowRank, targets: Targets
) -> dict[str, Array]:
    """Predicted changes by `added` (n matrices, one at each of `starts`) for the quantities of `measured_changes`:
    [n,Z,G,P] in the order of `PREDICTORS`. `path` is `direct_path(lab)`.

    A log-probability is its logit minus the mean of all logits under the native p, to first order; p is one more
    direction in the space of logits. Cost: one backward per horizon and token, and one per horizon.
    """
    wanted: list[int] = targets.positions.ravel().tolist()
    gradients = ReadGradients(lab.model, site.session, lab.hook.layer, lab.hook.head, wanted)
    change = np.empty((*targets.tokens.shape, len(PREDICTORS)))
    common = np.empty((*targets.positions.shape, 1, len(PREDICTORS)))
    for (i, z), position in np.ndenumerate(targets.positions):
        directions = _directions(site.session.logits[0, position], targets.tokens[i, z].tolist())
        reads = [gradients.at(int(position), direction) for direction in directions]
        naive = directions.to(path) @ path.T
        predictions = predict(site.recurrence, added.rows([i]), starts[i], reads, naive)
        values = np.array([[float(value) for value in each] for each in predictions])
        change[i, z], common[i, z] = values[:-1], values[-1]
    return {"logit": change, "log_prob": change - common}


def _directions(native: Tensor, tokens: list[int]) -> Tensor:
    """One row [vocab] per token that picks its logit, and a last one with the native probabilities."""
    probabilities = native.softmax(-1) if native.dtype == torch.float64 else native.float().softmax(-1)
    picks = torch.zeros(len(tokens), len(native)).to(probabilities)
    picks[torch.arange(len(tokens)), torch.tensor(tokens)] = 1
    return torch.cat([picks, probabilities[None]])


def rank_name(group: tuple[int, int]) -> str:
    """A rank group as tables and figures call it: "1", "2-5"."""
    low, high = group
    return str(low) if low == high else f"{low}-{high}"
