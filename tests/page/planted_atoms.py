"""A dictionary whose atoms are native writes of chosen tokens, for tests of atom pages."""

from __future__ import annotations

import torch
from saes import make_sae
from torch import Tensor

from hookpoints import HookedRecurrent
from sae_lens_writesae.sae import WriteTopKSAE
from writesae.page.atoms import AtomPages

LAYER, HEAD, N, T = 2, 3, 4, 48
HOOK = f"blocks.{LAYER}.mixer.heads.{HEAD}.hook_write_vec"
SMALL = AtomPages(
    n_atoms=None, min_firings=1, top=4, before=6, after=3, per_band=999, bands=2, effect_horizon=4, half_life_limit=30
)


def empty_sae(model: HookedRecurrent, d_sae: int = 6, rank: int = 1, decoder: str = "rank") -> WriteTopKSAE:
    """Atoms to be planted: the encoder is the atoms, and the strongest one of each token fires."""
    return make_sae(model, decoder, rank, d_sae, HOOK, k=1, encoder="tied" if decoder == "rank" else "bilinear")


def places() -> list[tuple[int, int]]:
    """Sequence and position of the token whose write each atom is."""
    return [(i % N, 5 + 6 * i) for i in range(6)]


def planted_sae(model: HookedRecurrent, tokens: Tensor) -> WriteTopKSAE:
    """Atoms that are native writes of chosen tokens, at unit norm: there they fire with its norm, at cosine 1."""
    sae, recurrence = empty_sae(model), model.recurrence(tokens, LAYER)
    sequences, positions = map(list, zip(*places()))
    with torch.no_grad():
        sae.v[:, 0] = torch.nn.functional.normalize(recurrence.k[sequences, positions, HEAD], dim=-1)
        sae.w[:, 0] = torch.nn.functional.normalize(recurrence.u[sequences, positions, HEAD], dim=-1)
        sae.v[1], sae.w[1] = -sae.v[1], -sae.w[1]  # the same atom by another name
    return sae


def matrix(sae: WriteTopKSAE, atom: int) -> Tensor:
    """[K,V] an atom in float64."""
    return (sae.v[atom].mT @ sae.w[atom]).detach().double()
