"""What is typical of a head: its mean write, and the direction of its states."""

import torch

from sae_lens_writesae import LowRank
from writesae_study.head.writes import mean_write


def test_mean_write_holds_the_share_of_energy_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(30, n, generator=generator, dtype=torch.float64) for n in (5, 7))
    complete, most = mean_write(keys, values), mean_write(keys, values, energy=0.8)
    mean = LowRank.rank_one(keys, values).dense().mean(0)
    torch.testing.assert_close(complete.dense()[0], mean)
    missing = (mean - most.dense()[0]).square().sum() / mean.square().sum()
    assert most.rank < complete.rank == 5 and 0 < missing <= 0.2
