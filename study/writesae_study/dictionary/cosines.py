"""How each atom of a dictionary points against a head's native writes, at its firings and elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hookpoints import Recurrence
from sae_lens_writesae.atom.low_rank import LowRank
from writesae.experiment.firings import Integers
from writesae.head.matrices import matrices_of
from writesae.head.writes import head_writes
from writesae_study.experiment.bench import Bench
from writesae_study.head.components import fit_pca
from writesae_study.head.writes import random_units, torch_generator


def firing_cosines(
    lab: Bench, atoms: Integers, label: str | None = None, directions: Mapping[str, LowRank] | None = None
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

    Returns: sequence, position, atom, cosine, shuffled, random, untrained, and one column for each further direction.
    One row per firing. A cosine with a write or an atom that is zero is 0.

    Cost: one forward up to the head's layer per sequence, and 3 T F R R' (K + V) for the cosines; for a dictionary of
    states also T F R K V, and T K V numbers.
    """
    firings = lab.firings(label)
    hook = lab.hook if label is None else lab.hooks[label]
    decoded = lab.atoms(atoms, label)
    rng = lab.rng(len(atoms))
    # The noise has its own seed: a dictionary initialized under `lab.seed` would otherwise be its own null.
    noise = decoded.random_like(torch_generator(rng))
    seed = int(lab.rng(len(atoms), 1).integers(2**62))
    untrained = random_units(decoded, firings.n_atoms, seed)
    # One sequence at a time: its writes, and the atoms that fire in it.
    tables = []
    for sequence in range(len(lab.tokens)):
        table = firings.frame(firings.sequence == sequence)
        # The place of each activation among all that fire there, before atoms are left out.
        by_size = table.groupby("position")["activation"].rank(method="first", ascending=False)
        table["place"] = by_size.astype(int) - 1
        table = table[table["atom"].isin(atoms)]
        order = rng.permutation(firings.n_positions)  # drawn also where nothing fires: no draw depends on the atoms
        if table.empty:
            continue
        recurrence = lab.recurrence(sequence)
        writes = head_writes(recurrence, 0).to(decoded.values)
        position = table["position"].to_numpy(copy=True)
        shuffled = order[position]
        column = pd.Index(atoms).get_indexer(pd.Index(table["atom"]))
        # The untrained null: where the atom is the n-th strongest, the random atom that is the n-th strongest.
        fires = _by_product(untrained, writes, recurrence, hook.target)
        place = torch.tensor(table["place"].to_numpy())
        drawn = untrained.rows(fires[torch.tensor(position), place])
        # [T,N] of every token with every atom; firings and shuffled positions are read off it.
        cosines = writes.cosines(decoded).cpu().numpy()
        of_firings = table.drop(columns=["activation", "place"]).assign(
            cosine=cosines[position, column],
            shuffled=cosines[shuffled, column],
            random=writes.cosines(noise).cpu().numpy()[position, column],
            untrained=writes.rows(torch.tensor(position)).cosine(drawn).cpu().numpy(),
        )
        for name, direction in (directions or {}).items():
            to_writes = writes.cosines(direction.to(writes.values))
            of_firings[name] = to_writes[position, 0].cpu().numpy()
        tables.append(of_firings)
    return pd.concat(tables, ignore_index=True)


def _by_product(atoms: LowRank, writes: LowRank, recurrence: Recurrence, target: str) -> Tensor:
    """[T,F] numbers of atoms of norm 1, by falling product with what a dictionary of `target` reads at each token."""
    if target == "write":
        products = atoms.cosines(writes).T
    else:
        states = matrices_of(recurrence, target).to(atoms.values)
        products = torch.einsum("tkv,frk,frv->tf", states, atoms.keys, atoms.values)
    return products.argsort(dim=1, descending=True, stable=True)


_COMPONENT_WRITES = 1024


@torch.no_grad()
def first_component(lab: Bench) -> LowRank:
    """The first principal component (N = 1) of up to 1,024 native writes of the first 16 sequences, turned so that
    its mean inner product with them is positive; zero where the writes do not vary."""
    writes = lab.native_writes(range(min(16, len(lab.tokens))))
    count = min(_COMPONENT_WRITES, len(writes))
    drawn = np.sort(lab.rng(12).choice(len(writes), count, replace=False)).tolist()
    pca = fit_pca(writes.rows(drawn), 1)
    component = pca.components.sum(0)  # of one, or of none
    sign = torch.sign(component @ pca.mean)  # that of a component means nothing
    return LowRank.svd((component * sign).view(1, *lab.key_value))
