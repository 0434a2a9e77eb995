"""What can be written in the place of a native write: by a dictionary, and without one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_lens_writesae.atom.low_rank import LowRank, mean_write, state_direction
from writesae.experiment.conditions import state_after, state_before
from writesae.experiment.head import head_writes
from writesae.experiment.lab import Lab, Site
from writesae.experiment.pca import MatrixPca, fit_pca
from writesae.experiment.reconstruction import decoded, dominant, encoded, matrices_of

ATOM, ATOM_SVD, SVD = "atom", "atom svd", "svd"
"""What a dictionary writes: its strongest atom; the same cut to rank 1, where it is of a higher rank; the top-1 SVD of
its reconstruction."""

_MEAN_ENERGY = 0.99
"""The mean write is kept as the fewest rank-1 terms that hold this share of its squared norm."""


class Basis(NamedTuple):
    """What is known of a head from sequences that nothing is tested on."""

    pca: MatrixPca
    """Of the native writes."""
    mean: LowRank
    """The mean native write, N = 1."""
    target_mean: Tensor
    """[K*V] mean of what the dictionaries reconstruct: writes or states."""

    @classmethod
    def fit(cls, lab: Lab, sequences: Sequence[int], n_writes: int, n_components: int) -> Basis:
        """From some sequences; components from `n_writes` writes drawn evenly over them.

        Cost: a forward of each sequence up to the layer, and K V numbers for each of these writes.
        """
        rng, per_sequence = lab.rng(11), -(-n_writes // len(sequences))
        keys, values, rows, sums, n_tokens = [], [], [], [], 0
        for sequence in sequences:
            recurrence = lab.recurrence(sequence)
            writes = head_writes(recurrence, 0)
            keys.append(writes.keys.flatten(0, 1))
            values.append(writes.values.flatten(0, 1))
            drawn = np.sort(rng.choice(len(writes), min(per_sequence, len(writes)), replace=False)).tolist()
            rows.append(writes.rows(drawn).dense().flatten(1))
            sums.append(matrices_of(recurrence, lab.hook.target).flatten(1).double().sum(0))
            n_tokens += len(writes)
        pca = fit_pca(torch.cat(rows)[:n_writes], n_components)
        mean = mean_write(torch.cat(keys), torch.cat(values), _MEAN_ENERGY)
        return cls(pca, mean, (torch.stack(sums).sum(0) / n_tokens).to(pca.mean))


class Written(NamedTuple):
    """What one baseline writes at N positions of a sequence."""

    sae: str
    """Label of the dictionary; "" where none is needed."""
    condition: str
    matrices: LowRank
    has_size: bool
    """Whether the matrices have a size of their own; otherwise they are directions."""

    def sized(self, native: LowRank, scale: str) -> LowRank:
        """At the norm of the native write (`scale` "matched"), or at its own size ("coefficient"); a direction gets the
        projection of the native write on it, its best. What is zero, because nothing fires, stays zero."""
        if scale == "coefficient" and self.has_size:
            return self.matrices
        square = self.matrices.inner(self.matrices)
        wanted = self.matrices.inner(native) if scale == "coefficient" else native.norm() * square.sqrt()
        return self.matrices * torch.where(square > 0, wanted / square.clamp_min(torch.finfo(square.dtype).tiny), 0)


def without_dictionary(
    lab: Lab, site: Site, native: LowRank, positions: list[int], basis: Basis, pca_ranks: Sequence[int]
) -> Iterator[Written]:
    """Directions and projections that need no dictionary, at some positions of one sequence."""
    seed = int(lab.rng(10, site.sequence).integers(2**62))
    yield Written("", "random", native.random_like(torch.Generator().manual_seed(seed)), False)
    yield Written("", "mean", basis.mean.expand(len(native)), False)
    yield Written("", "state", state_direction(state_before(site, positions)), False)
    yield Written("", "state_after", state_direction(state_after(site, positions)), False)
    dense = native.dense()
    for rank in pca_ranks:
        projected = basis.pca.project(dense.flatten(1), rank).view_as(dense)
        yield Written("", f"pca {rank}", LowRank.svd(projected, balanced=True), True)


def of_dictionary(lab: Lab, label: str, matrices: Tensor, native: LowRank) -> Iterator[Written]:
    """The strongest atom of a dictionary by |a_i| |A_i|, and its reconstruction, of matrices [N,K,V]."""
    sae = lab.saes[label]
    activations = encoded(sae, matrices)
    strongest = dominant(sae, activations)
    atoms = lab.atoms(strongest.cpu().numpy(), label)
    atom = (atoms * activations.gather(1, strongest[:, None])[:, 0].to(atoms.values)).to(native.values)
    yield Written(label, ATOM, atom, True)
    if atom.rank > 1:
        yield Written(label, ATOM_SVD, LowRank.svd(atom.dense(), 1, balanced=True), True)
    yield Written(label, SVD, LowRank.svd(decoded(sae, activations, matrices), 1, balanced=True), True)
