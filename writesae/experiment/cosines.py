"""How each atom of a dictionary points against a head's native writes, at its firings and elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sae_lens_writesae.atom.low_rank import LowRank
from writesae.experiment.firings import Integers
from writesae.experiment.head import head_writes, matrices_of, random_units
from writesae.experiment.lab import Lab
from writesae.experiment.pca import fit_pca

SIDES = ("key", "value", "shuffled_key", "shuffled_value")
"""Columns that hold |cosines| of one side."""


def firing_cosines(
    lab: Lab, atoms: Integers, label: str | None = None, directions: Mapping[str, LowRank] | None = None
) -> pd.DataFrame:
    """Signed cosines <A_i, W_t> / |A_i||W_t| at the firings (i, t) of `atoms`, and what chance gives.

    * `shuffled`: the same atom against the write of another position of the same sequence (one random permutation of
      the positions per sequence). This is what is left when only the head's typical writes, and not this firing, can
      match.
    * `random`: a Gaussian rank-R direction instead of the atom (one per atom), at the same firings.
    * `untrained`: where the atom has the n-th largest activation, that one of F Gaussian rank-R directions which has
      the n-th largest product with what the dictionary reads. An atom fires where its product is large, so that random
      atoms, too, point along the writes they fire on; this is how far.

    Args:
        label: of the dictionary; by default the first one.
        directions: single matrices (N = 1) by name, which are compared with the writes at the same firings.

    Returns: sequence, position, atom, cosine, shuffled, random, untrained; key, value, shuffled_key, shuffled_value
    (|cosine| of one side of the matrices); and one column for each further direction. One row per firing. A cosine with
    a write or an atom that is zero is 0.

    Cost: one forward up to the head's layer per sequence, and 3 T F R R' (K + V) for the cosines; for a dictionary of
    states also T F R K V, and T K V numbers.
    """
    firings, target = lab.firings(label), (lab.hook if label is None else lab.hooks[label]).target
    decoded = lab.atoms(atoms, label)
    rng = lab.rng(len(atoms))
    # The noise has its own seed: a dictionary initialized under `lab.seed` would otherwise be its own null.
    noise = decoded.random_like(torch.Generator().manual_seed(int(rng.integers(2**62))))
    untrained = random_units(decoded, firings.n_atoms, int(lab.rng(len(atoms), 1).integers(2**62)))
    tables = []
    for sequence in range(len(lab.tokens)):
        table = firings.frame(firings.sequence == sequence)
        table["place"] = table.groupby("position")["activation"].rank(method="first", ascending=False).astype(int) - 1
        table = table[table["atom"].isin(atoms)]
        order = rng.permutation(firings.n_positions)
        if table.empty:
            continue
        recurrence = lab.recurrence(sequence)
        writes = head_writes(recurrence, 0).to(decoded.values)
        here, which = table["position"].to_numpy(copy=True), pd.Index(atoms).get_indexer(pd.Index(table["atom"]))
        there = order[here]
        if target == "write":
            products = untrained.cosines(writes).T
        else:
            states = matrices_of(recurrence, target).to(untrained.values)
            products = torch.einsum("tkv,frk,frv->tf", states, untrained.keys, untrained.values)
        fires = products.argsort(dim=1, descending=True, stable=True)  # [T,F] atoms by falling product
        drawn = untrained.rows(fires[torch.tensor(here), torch.tensor(table["place"].to_numpy())])
        matched, chance = (writes.cosines(each).cpu().numpy() for each in (decoded, noise))
        key, value = (side.cpu().numpy() for side in side_cosines(writes, decoded))
        further = {n: writes.cosines(x.to(writes.values))[here, 0].cpu().numpy() for n, x in (directions or {}).items()}
        tables.append(
            table.drop(columns=["activation", "place"]).assign(
                cosine=matched[here, which],
                shuffled=matched[there, which],
                random=chance[here, which],
                untrained=writes.rows(torch.tensor(here)).cosine(drawn).cpu().numpy(),
                key=key[here, which],
                value=value[here, which],
                shuffled_key=key[there, which],
                shuffled_value=value[there, which],
                **further,
            )
        )
    return pd.concat(tables, ignore_index=True)


@torch.no_grad()
def first_component(lab: Lab, n_writes: int) -> LowRank:
    """The first principal component (N = 1) of up to `n_writes` native writes of the first 16 sequences, turned so that
    its mean inner product with them is positive; zero where the writes do not vary."""
    writes = lab.native_writes(range(min(16, len(lab.tokens))))
    drawn = np.sort(lab.rng(12).choice(len(writes), min(n_writes, len(writes)), replace=False)).tolist()
    pca = fit_pca(writes.rows(drawn), 1)
    component = pca.components.sum(0)  # of one, or of none
    return LowRank.svd((component * torch.sign(component @ pca.mean)).view(1, *lab.key_value))


def side_cosines(one: LowRank, other: LowRank) -> tuple[Tensor, Tensor]:
    """|cosine| of the key sides and of the value sides of all pairs [N,M]; 0 where a side is zero.

    For rank 1 their product is the size of `LowRank.cosines`; each side's own sign means nothing, because both may
    flip. The sides of a matrix of a higher rank are its top singular vectors: an SVD each.
    """
    pair = [each if each.rank == 1 else LowRank.svd(each.dense(), 1) for each in (one, other)]
    (a, x), (b, y) = ([normalize(side[:, 0], dim=1, eps=1e-30) for side in (each.keys, each.values)] for each in pair)
    return (a @ b.mT).abs(), (x @ y.mT).abs()
