"""How each atom of a dictionary points against a head's native writes, at its firings and elsewhere."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.conditions import Factors, norm, random_directions
from sae_lens_writesae.firings import Firings, HeadHook, atom_factors
from sae_lens_writesae.head_memory import head_writes


class FiringCosines(NamedTuple):
    """Signed cosines <A_i, W_t> / |A_i||W_t| over firings (i, t), for the dictionary and two nulls."""

    table: pd.DataFrame
    """sequence, position, atom, cosine, shuffled, random. One row per firing at a write that is not zero."""
    zero_writes: int
    """Firings left out because the native write there, or at the shuffled position, is zero."""
    zero_atoms: NDArray[np.int64]
    """Atoms left out because they are zero."""


cosines = LowRank.cosines


@torch.no_grad()
def firing_cosines(
    model: Any, sae: Any, tokens: Tensor, firings: Firings, atoms: NDArray[np.int64], *, seed: int = 0
) -> FiringCosines:
    """Cosines at the firings of `atoms`, beside what chance gives.

    * `shuffled`: the same atom against the write of another position of the same sequence (one random permutation of
      the positions per sequence): what is left when only the head's typical writes, not this firing, can match.
    * `random`: a Gaussian rank-R direction in the place of the atom (one per atom), at the same firings.

    Cost: one forward up to the SAE's layer per sequence, and 2 T F R (K + V) for the cosines.
    """
    hook = HeadHook.of(sae)
    shape = model.cfg.layer(hook.layer)
    own = atom_factors(sae, atoms, shape.K, shape.V)
    alive = norm(own) > 0
    own, kept = own.rows(alive), atoms[alive.cpu().numpy()]
    rng = np.random.default_rng([seed, len(atoms)])
    # not `seed` itself: a dictionary initialised under the same seed would be its own null
    noise = random_directions(own, torch.Generator().manual_seed(int(rng.integers(2**62))))
    column = np.full(firings.n_atoms, -1)
    column[kept] = np.arange(len(kept))
    parts, zero_writes = [], 0
    for sequence in range(len(tokens)):
        table: Any = firings.frame((firings.sequence == sequence) & (column[firings.atom] >= 0))
        order = rng.permutation(firings.n_positions)
        if table.empty:
            continue
        found = model.recurrence(tokens[sequence : sequence + 1], hook.layer)
        writes = head_writes(found, hook.head, "additive").native
        writes = Factors(writes.keys.to(own.keys), writes.values.to(own.values))
        written = (norm(writes) > 0).cpu().numpy()
        here, there = table["position"].to_numpy(), order[table["position"].to_numpy()]
        usable = written[here] & written[there]
        zero_writes += int((~usable).sum())
        table, here, there = table[usable], here[usable], there[usable]
        which = column[table["atom"].to_numpy()]
        matched, chance = (cosines(writes, each).cpu().numpy() for each in (own, noise))
        parts.append(
            table.drop(columns="activation").assign(
                cosine=matched[here, which], shuffled=matched[there, which], random=chance[here, which]
            )
        )
    columns = ["sequence", "position", "atom", "cosine", "shuffled", "random"]
    joined = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)
    return FiringCosines(joined, zero_writes, np.setdiff1d(atoms, kept))
