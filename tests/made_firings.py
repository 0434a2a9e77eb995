"""Made-up firings, for tests of what finds and draws them."""

from __future__ import annotations

from typing import Any

import torch

from writesae.experiment import firings as F

N, T, ATOMS = 12, 40, 9
BOUNDS = {"first": 2, "last": 30}


def collected(activations: torch.Tensor) -> F.Firings:
    """Those of activations [N,T,F]."""
    places = activations.nonzero(as_tuple=True)
    return F.Firings(*(x.numpy() for x in (*places, activations[places])), N, T, ATOMS)


def at(*places: tuple[Any, Any, Any]) -> F.Firings:
    """Firings at some places alone, all of activation 1."""
    activations = torch.zeros(N, T, ATOMS)
    for place in places:
        activations[place] = 1
    return collected(activations)


def drawn_activations() -> torch.Tensor:
    """Activations [N,T,F]: atom i fires with probability (i + 1) / 20; atom 8 never."""
    g, chance = torch.Generator().manual_seed(0), (torch.arange(ATOMS) + 1) / 20
    chance[8] = 0
    return torch.rand(N, T, ATOMS, generator=g) * (torch.rand(N, T, ATOMS, generator=g) < chance)
