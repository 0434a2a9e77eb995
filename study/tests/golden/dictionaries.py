"""Dictionaries without training, the same on every run: their atoms are native writes of held-out text."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from saes import sae_of
from torch import Tensor
from torch.nn.functional import normalize

from hookpoints import HookedRecurrent, embedded
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae import WriteTopKSAE

from .cases import HEADS

ATOMS_FROM = 16
"""Sequence of the held-out text from which on atoms are drawn; evaluations use the sequences before it."""


@cache
def load_model(name: str) -> HookedRecurrent:
    """An embedded model; one object for all cases."""
    return HookedRecurrent.from_pretrained(name)


@cache
def sequences(name: str, length: int) -> Tensor:
    """[N,length] tokens: the held-out text from its beginning, cut into sequences without gaps."""
    ids = load_model(name).to_tokens(embedded.text("test")[:12_000], prepend_bos=False, truncate=False)[0]
    n = len(ids) // length
    return ids[: n * length].view(n, length)


@torch.no_grad()
def make_dictionary(
    model_name: str,
    *,
    seed: int = 0,
    target: str = "write",
    rank: int = 1,
    encoder: str = "bilinear",
    flat: bool = False,
    norms: tuple[float, float] = (1.0, 1.0),
) -> WriteTopKSAE:
    """A `writesae_topk` SAE of 48 atoms, 4 of them at a token, on the head that `HEADS` names.

    Atom f is the sum of `rank` native writes, drawn with `seed`, rescaled to a Frobenius norm that goes linearly from
    norms[0] to norms[1] over the atoms. The encoder equals the decoder, and the biases are zero.
    """
    model, (layer, head), d_sae = load_model(model_name), HEADS[model_name], 48
    writes = model.recurrence(sequences(model_name, 48)[ATOMS_FROM : ATOMS_FROM + 8], layer)
    keys, values = writes.k[:, :, head].flatten(0, 1), writes.u[:, :, head].flatten(0, 1)
    drawn = np.random.default_rng(seed).choice(len(keys), d_sae * rank, replace=False)
    v, w = (normalize(side[torch.from_numpy(drawn)].view(d_sae, rank, -1), dim=-1) for side in (keys, values))
    size = torch.linspace(*norms, d_sae) / (v.mT @ w).flatten(1).norm(dim=1)
    atoms = LowRank(v, w * size[:, None, None])
    more = {} if flat else {"encoder": encoder}
    hook = f"blocks.{layer}.mixer.heads.{head}.hook_{target}_vec"
    return sae_of(hook, model_name, atoms, 4, flat=flat, **more)
