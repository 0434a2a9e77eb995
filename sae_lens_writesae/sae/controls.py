"""Control dictionaries: class, config and size of a trained one, with atoms that nothing was learned for.

What a trained dictionary shows is its training's merit only where these do not show it as well: atoms of random
directions (`untrained`), and atoms that are writes of the model drawn at random (`native`).
"""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import torch
from sae_lens.saes.sae import SAE
from torch import Tensor

from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.errors import NothingToMeasureError
from sae_lens_writesae.sae.matrix import MatrixSAE
from sae_lens_writesae.sae.training import calibrate_threshold


@torch.no_grad()
def untrained(sae: SAE, matrices: Tensor, *, seed: int = 0) -> MatrixSAE:
    """The dictionary as training would begin with it: random unit-norm atoms, the encoder equal to them.

    Args:
        sae: the trained dictionary.
        matrices: [N,K*V] of the kind that it reads, from a text that nothing is tested on. Their mean becomes b_dec,
            unless the trained one began with zeros. Where the architecture has a threshold (or biases that act as one),
            it is set so that as many atoms are active per matrix as in `sae`.
        seed: of the atoms, the same on every device.

    Cost: an encode by both dictionaries, N F numbers.

    Raises:
        ValueError: `sae` is not of an architecture of this package.
    """
    new = _fresh(sae, matrices, seed)
    _calibrate(new, sae, matrices)
    return new


@torch.no_grad()
def native(sae: SAE, matrices: Tensor, writes: LowRank, *, seed: int = 0) -> MatrixSAE:
    """The dictionary whose atoms are native writes of its head, drawn at random, at unit norm, the encoder equal to
    them.

    Args:
        sae, matrices: as in `untrained`.
        writes: from which as many are drawn as the dictionary has atoms (on the larger side, where they are products),
            without repetition if there are enough; zero ones are left out. They are cut to the rank of the dictionary's
            atoms where theirs is higher.
        seed: of the draw.

    Raises:
        ValueError: `sae` is not of an architecture of this package.
        NothingToMeasureError: all writes are zero.
    """
    new = _fresh(sae, matrices, seed)
    n_atoms, rank = new.n_factors, new.cfg.rank
    able = torch.nonzero(writes.norm() > 0).flatten().cpu()
    if len(able) == 0:
        raise NothingToMeasureError("the head writes nothing on the text from which native writes are drawn")
    order = torch.randperm(len(able), generator=torch.Generator().manual_seed(seed))
    drawn = able[order.repeat(math.ceil(n_atoms / len(able)))[:n_atoms]]
    atoms = writes.rows(drawn.to(writes.keys.device)).to(torch.float32)
    if new.cfg.decoder == "rank" and atoms.rank != rank:
        atoms = LowRank.svd(atoms.dense(), rank, balanced=True)
    atoms = atoms.with_norm(atoms.norm().new_ones(n_atoms)).to(new.b_dec.device)
    everywhere = torch.arange(n_atoms, device=new.b_dec.device)
    new.replace_atoms(everywhere, atoms, torch.ones_like(everywhere, dtype=torch.bool))
    _calibrate(new, sae, matrices)
    return new


def _fresh(sae: SAE, matrices: Tensor, seed: int) -> MatrixSAE:
    """Unit-norm atoms as the class draws them, encoder equal to the decoder, biases 0, b_dec by the recipe of `sae`."""
    if not isinstance(sae, MatrixSAE):
        raise ValueError(
            f"control dictionaries are made for the architectures of this package, found {type(sae).__name__}"
        )
    cfg: Any = copy.deepcopy(sae.cfg)
    cfg.device = "cpu"  # so that a seed means the same on every device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = cast(MatrixSAE, type(sae)(cfg)).to(sae.b_dec.device, sae.b_dec.dtype).eval()
    new._scale_in_place(1 / new.decoder_norm(), 1 / new.encoder_norm())
    details = cfg.metadata.training_architecture_details or {}
    if details.get("b_dec_init", "mean") == "mean":
        new.b_dec.data.copy_(matrices.float().mean(0))
    new.cfg.metadata.start_cosine = 1.0
    return new


def _calibrate(new: MatrixSAE, sae: SAE, matrices: Tensor) -> None:
    """Make as many atoms of `new` active per matrix as are of `sae`. With a fixed number of them there is nothing to
    set; Standard and Gated, which have no threshold, get one bias for all atoms."""
    if getattr(new.cfg, "k", None) is not None:
        return
    x = matrices.to(new.b_dec.device, new.b_dec.dtype)
    wanted = int((sae.encode(x) > 0).sum())
    if {"threshold", "topk_threshold"} & {*new.state_dict()}:
        calibrate_threshold(new, [x], min(wanted / len(x), int(new.cfg.d_sae) - 1))
    elif wanted < len(x) * int(new.cfg.d_sae):
        top = (new.process_sae_in(x) @ new.W_enc).flatten().topk(wanted + 1).values
        between = top[-2:].mean() if wanted else 2 * top[0]  # of the last one in and the first one out
        bias = cast(Tensor, getattr(new, "b_gate" if hasattr(new, "b_gate") else "b_enc"))
        bias.data.fill_(-max(float(between), 0.0))
