"""Dead atoms get a new life as the leading directions of what is badly reconstructed.

The paper's code draws rows of the raw state, with repetition; a batch dominated by one direction then yields many
copies of it. Here the matrices are residuals, drawn without repetition in proportion to their squared error, cut to
rank R by SVD, and near-copies are left out.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_lens_writesae.atom import sparse
from sae_lens_writesae.sae.base import AtomFactors, atom_norm, truncated_svd

if TYPE_CHECKING:
    from sae_lens_writesae.sae.coding import Coding

_MAX_COSINE = 0.9
"""Two candidates closer than this are one."""


@torch.no_grad()
def resample(sae: "Coding", x: Tensor, dead: Tensor) -> int:
    """Replace atoms where `dead` [F] by rank-R directions of the residual of x [N,K*V]; returns how many.

    At most one atom per row and fewer if rows resemble each other; the rest wait for the next time. A new atom has
    the mean norm of the living ones, encoder and decoder alike, and its biases start again. Costs an encode, a decode
    and one SVD of K x V per atom.
    """
    n_dead = int(dead.sum())
    if n_dead == 0:
        return 0
    residual = (x - sae.decode(sae.encode(x))).float()
    chosen = distinct_directions(residual.view(-1, sae.cfg.d_k, sae.cfg.d_v), n_dead, sae.cfg.rank)
    indices = torch.nonzero(dead).flatten()[: len(chosen.v)]
    sae.replace_atoms(indices, chosen, ~dead)
    return len(indices)


def distinct_directions(residuals: Tensor, count: int, rank: int) -> AtomFactors:
    """Up to `count` unit-norm atoms of rank R from residual matrices [N,K,V], no two closer than cosine 0.9."""
    weights = residuals.flatten(1).square().sum(1)
    count = min(count, int((weights > 0).sum()))
    if count == 0:
        return truncated_svd(residuals[:0], rank)
    rows = torch.multinomial(weights / weights.max(), count, replacement=False)
    v, w = truncated_svd(residuals[rows], rank)
    scale = atom_norm(v, w).rsqrt()[:, None, None]
    atoms = sparse.khatri_rao(v * scale, w * scale)
    repeated = (atoms @ atoms.T).tril(-1).amax(1) > _MAX_COSINE
    return AtomFactors((v * scale)[~repeated], (w * scale)[~repeated])
