"""Directions and means of what one head writes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sae_lens_writesae.atom.low_rank import LowRank


def state_direction(states: Tensor) -> LowRank:
    """The top singular direction x y^T of states [N,K,V], at unit norm and with <S, x y^T> > 0. Costs an SVD each."""
    left, _, right = torch.linalg.svd(states, full_matrices=False)
    return LowRank.rank_one(left[:, :, 0], right[:, 0])


def mean_write(keys: Tensor, values: Tensor, energy: float = 1.0) -> LowRank:
    """The mean over tokens of k_t u_t^T from keys [T,K] and values [T,V], as one matrix (N = 1).

    It has the fewest singular terms, largest first, that hold the share `energy` of its squared norm (1: all of them).
    """
    return compact((keys.T @ values / len(keys))[None], energy)


def compact(matrices: Tensor, energy: float) -> LowRank:
    """Matrices [N,K,V] as the fewest singular terms that hold the share `energy` of each one's squared norm."""
    terms = LowRank.svd(matrices)
    square = terms.keys.square().sum(-1)  # values have norm 1
    square_of_all = square.sum(1, keepdim=True).clamp_min(torch.finfo(square.dtype).tiny)
    share = square.cumsum(1) / square_of_all
    count = int((share < energy).sum(1).max()) + 1
    return terms.terms(slice(count))


def random_units(like: LowRank, n: int, seed: int) -> LowRank:
    """n Gaussian directions of the rank of `like`, at unit norm."""
    drawn = like.rows([0]).expand(n).random_like(torch.Generator().manual_seed(seed))
    return drawn.with_norm(torch.ones(n).to(drawn.values))


def torch_generator(rng: np.random.Generator) -> torch.Generator:
    """Random numbers of torch that a stream of numpy seeds: numpy's streams are separate by their names, torch's are
    not."""
    return torch.Generator().manual_seed(int(rng.integers(2**62)))


def nats(logits: Tensor, tokens: Tensor) -> float:
    """Mean of -log p(next token) over a sequence: logits [T,vocab], tokens [T]."""
    # In float64: what an edit costs is a small difference of two of these.
    return float(torch.nn.functional.cross_entropy(logits[:-1].double(), tokens[1:].to(logits.device)))
