"""Matching of dictionaries: order, sign and scale do not matter, and the assignment is the best one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sae_lens_writesae.atom.low_rank import LowRank
from writesae.experiment.matching import match_atoms


def dictionary(seed: int, n: int = 40, rank: int = 1) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(*(torch.randn(n, rank, size, generator=generator) for size in (9, 7)))


@pytest.mark.parametrize("rank", [1, 3])
def test_order_and_sign_do_not_matter(rank: int) -> None:
    a = dictionary(0, rank=rank)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    sign = torch.where(torch.arange(40) % 2 == 0, 1.0, -1.0)[:, None, None]
    match = match_atoms(a, LowRank(a.keys[order] * 3, (a.values * sign)[order]))
    assert match.cosine == pytest.approx(np.ones(40), abs=1e-6)
    assert order[match.second].tolist() == match.first.tolist()


def test_matching_is_the_best_assignment_and_not_greedy() -> None:
    """Greedy takes the largest cosine and is left with 0; the best sum takes the two others."""
    rows = torch.tensor([[0.9, 0.8, 0.0], [0.8, 0.0, 0.6]])
    rows = torch.nn.functional.normalize(rows, dim=1)[:, None]
    a = LowRank(torch.eye(3)[:2][:, None], torch.ones(2, 1, 1))
    assert match_atoms(a, LowRank(rows, torch.ones(2, 1, 1))).second.tolist() == [1, 0]


def test_random_dictionaries_do_not_match() -> None:
    match = match_atoms(dictionary(0), dictionary(1, n=30))
    assert len(match.cosine) == 30 and len(set(match.second)) == 30
    assert np.median(match.cosine) < 0.5
    with pytest.raises(ValueError, match="0 and 40"):
        match_atoms(dictionary(0).rows([]), dictionary(1))
