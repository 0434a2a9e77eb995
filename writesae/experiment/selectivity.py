"""What an atom moves alone, and where it fires: two statistics of selectivity.

The paper's selectivity (I.1, figures 9 and 10) is of directions: 1 - overlap of the K tokens that an edit moves most
with those that a random direction of its norm moves. It says itself that any direction scores above 0.99, because two
random sets of 32 tokens in a large vocabulary hardly meet. `own_tokens` is this project's: how far the firings of an
atom are at one token.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sae_lens_writesae.atom.low_rank import LowRank
from writesae.experiment.firings import Firings, Integers
from writesae.experiment.lab import EditedRows, Lab, Readout, Site, Trial

_COLUMNS = ("atom", "firings", "token", "share", "chance")


def moved_tokens(k: int) -> Readout:
    """Readout: `moved` [k], the tokens whose log-probability changes most, up or down, at the edited token."""

    def read(rows: EditedRows) -> Mapping[str, Integers]:
        change = rows.window[:, 0].log_softmax(-1) - rows.native_window[:, 0].log_softmax(-1)
        return {"moved": change.abs().topk(min(k, change.shape[1])).indices.cpu().numpy()}

    return read


def direction_selectivity(
    lab: Lab, site: Site, positions: list[int], atoms: Mapping[str, LowRank], k: int
) -> pd.DataFrame:
    """1 - |top k of a direction and top k of a random one| / k at some positions of one sequence, where each direction
    is added to the write at the norm of the native write (the paper's eps = 1).

    Args:
        atoms: for each dictionary the atom at each position; those that are zero are left out.

    Returns: columns sae, sequence, position, selectivity, chance: the same of a second random direction of the rank of
    the first dictionary's atoms, which is what a direction without any meaning has.

    Cost: an edited row of one token for each direction and position, two of them random.
    """
    native, first = site.at(positions), next(iter(atoms.values()))
    generator = torch.Generator().manual_seed(int(lab.rng(13, site.sequence).integers(2**62)))
    directions = {"random": first.random_like(generator), "other": first.random_like(generator)}
    directions |= {f"atom {label}": atom for label, atom in atoms.items()}
    trials = []
    for name, direction in directions.items():
        size = direction.norm()
        for n, t in enumerate(positions):
            if size[n] > 0:
                added = direction.rows([n]) * (native.norm()[n] / size[n])
                trials.append(Trial({"name": name, "position": t}, t, lab.add(t, added)))
    moved = lab.read(site, trials, moved_tokens(k), 1).set_index(["name", "position"])["moved"]
    rows = []
    for label in atoms:
        for t in positions:
            if (f"atom {label}", t) in moved.index:
                random = set(moved["random", t])
                alike = {name: len(random & set(moved[name, t])) / len(random) for name in (f"atom {label}", "other")}
                rows.append((label, site.sequence, t, 1 - alike[f"atom {label}"], 1 - alike["other"]))
    return pd.DataFrame(rows, columns=["sae", "sequence", "position", "selectivity", "chance"])


def own_tokens(firings: Firings, tokens: Tensor, min_firings: int, rng: np.random.Generator) -> pd.DataFrame:
    """For each atom with at least `min_firings` firings on tokens [N,T]: the most frequent token among its firings, its
    `share` of them, and `chance`, the same share for as many positions drawn at random. Cost: a pass over the firings.
    """
    ids = tokens.cpu().numpy().ravel()
    places = firings.sequence * firings.n_positions + firings.position
    order = np.argsort(firings.atom, kind="stable")
    atoms, starts = np.unique(firings.atom[order], return_index=True)
    rows = []
    for atom, of_atom in zip(atoms.tolist(), np.split(places[order], starts[1:])):
        if len(of_atom) >= min_firings:
            token, share = _most_frequent(ids[of_atom])
            _, chance = _most_frequent(ids[rng.choice(len(ids), len(of_atom), replace=False)])
            rows.append((atom, len(of_atom), token, share, chance))
    return pd.DataFrame(rows, columns=list(_COLUMNS))


def _most_frequent(ids: Integers) -> tuple[int, float]:
    values, counts = np.unique(ids, return_counts=True)
    best = int(counts.argmax())
    return int(values[best]), float(counts[best] / len(ids))
