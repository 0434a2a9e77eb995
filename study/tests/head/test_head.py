"""What is typical of a head: its mean write, and the direction of its states."""

import torch

from sae_lens_writesae import LowRank
from writesae_study.head.writes import mean_write

N, K, V = 6, 5, 7


def test_mean_write_holds_the_share_of_energy_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(30, n, generator=generator, dtype=torch.float64) for n in (K, V))
    whole, most = mean_write(keys, values), mean_write(keys, values, energy=0.8)
    torch.testing.assert_close(whole.dense()[0], LowRank.rank_one(keys, values).dense().mean(0))
    assert most.rank < whole.rank == min(K, V)
    missing = (whole.dense() - most.dense()).square().sum() / whole.dense().square().sum()
    assert 0 < missing <= 0.2
    assert mean_write(keys[:1], values[:1], energy=0.99).rank == 1
