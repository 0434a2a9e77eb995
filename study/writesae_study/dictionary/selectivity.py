"""What an atom moves alone, and at which tokens it fires: statistics of selectivity.

The paper's selectivity (I.1, figures 9 and 10) is of directions: 1 - overlap of the K tokens that an edit moves most
with those that a random direction of its norm moves. It says itself that any direction scores above 0.99, because two
random sets of 32 tokens in a large vocabulary hardly meet. `alignment` is of firings: how well an atom fires where a
token is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from sae_lens_writesae.atom.low_rank import LowRank
from writesae.experiment.firings import Firings, Integers
from writesae.experiment.lab import EditedRows, Site, Trial
from writesae_study.experiment.bench import Bench
from writesae_study.head.writes import torch_generator

SELECTIVITY: dict[str, str] = {
    "sae": "label of the dictionary",
    "sequence": "row of the evaluation tokens",
    "position": "token t at which the strongest atom is added",
    "selectivity": "1 - overlap of the tokens that it moves most with those of a random direction",
    "chance": "the same of a second random direction",
}
"""Columns of `direction_selectivity`."""


class Alignment(NamedTuple):
    """How well each of F atoms fires where each of N tokens is."""

    both: NDArray[np.int64]
    """[N,F] firings at the token."""
    phi: NDArray[np.float64]
    """[N,F] correlation of firing and token; 0 where one of them never or always is."""


def direction_selectivity(
    lab: Bench, site: Site, positions: list[int], atoms: Mapping[str, LowRank], k: int
) -> pd.DataFrame:
    """1 - |top k of a direction and top k of a random one| / k at some positions of one sequence, where each direction
    is added to the write at the norm of the native write (the paper's eps = 1). The top k are the tokens whose
    log-probability changes most, up or down, at the edited token.

    Args:
        atoms: for each dictionary the atom at each position; those that are zero are left out.

    Returns: columns sae, sequence, position, selectivity, chance: the same of a second random direction of the rank of
    the first dictionary's atoms, which is what a direction without any meaning has.

    Cost: an edited row of one token for each direction and position, two of them random.
    """

    def moved(rows: EditedRows) -> Mapping[str, Integers]:
        edited = rows.window[:, 0].log_softmax(-1)
        native = rows.native_window[:, 0].log_softmax(-1)
        change = (edited - native).abs()
        return {"moved": change.topk(min(k, change.shape[1])).indices.cpu().numpy()}

    native = site.at(positions)
    first = next(iter(atoms.values()))
    noise = torch_generator(lab.rng(13, site.sequence))
    # Two random directions: one to compare with, one that stands for a direction without meaning.
    directions = {("", name): first.random_like(noise) for name in ("random", "other")}
    directions |= {(label, "atom"): atom for label, atom in atoms.items()}
    trials = []
    for key, direction in directions.items():
        sizes = direction.norm()
        factors = native.norm() / sizes
        for n, t in enumerate(positions):
            if sizes[n] > 0:
                added = direction.rows([n]) * factors[n]
                trials.append(Trial({"key": (*key, t)}, t, lab.add(t, added)))
    table = lab.read(site, trials, moved, 1)
    top = {key: set(ids) for key, ids in zip(table["key"], table["moved"])}

    def apart(label: str, name: str, t: int) -> float:
        random = top["", "random", t]
        return 1 - len(random & top[label, name, t]) / len(random)

    # Only atoms have rows; the second random direction is the column `chance`.
    rows = []
    for label, name, t in top:
        if name == "atom":
            rows.append((label, site.sequence, t, apart(label, name, t), apart("", "other", t)))
    return pd.DataFrame(rows, columns=list(SELECTIVITY))


def alignment(firings: Firings, tokens: Tensor, sequences: Integers, token_ids: Sequence[int]) -> Alignment:
    """Correlation (phi) of every atom's firing with each of the `token_ids` tokens, over some sequences of `tokens`."""
    ids = tokens.cpu().numpy()
    inside = firings.of_sequences(sequences)
    n_atoms = firings.n_atoms
    places = ids[sequences].ravel()
    fired_at = ids[inside.sequence, inside.position]  # the token of each firing
    fired = np.bincount(inside.atom, minlength=n_atoms)
    counts = [np.bincount(inside.atom[fired_at == token], minlength=n_atoms) for token in token_ids]
    both = np.array(counts, dtype=np.int64).reshape(-1, n_atoms)  # there may be no token
    present = np.array([(places == token).sum() for token in token_ids])
    # phi of a 2 x 2 table by its counts: (n_11 n - n_1. n_.1) / sqrt(n_1. n_0. n_.1 n_.0)
    n = float(len(places))  # in float: products of four counts exceed 64 bits
    column = present[:, None].astype(float)
    scale = np.sqrt(fired * (n - fired) * column * (n - column))
    covariance = both * n - fired * column
    phi = np.where(scale > 0, covariance / np.maximum(scale, 1), 0.0)
    return Alignment(both, phi)
