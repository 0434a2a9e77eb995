"""Pursuit over books of codes."""

from __future__ import annotations

from typing import Any

import torch
from saes import untrained_sae

from sae_lens_writesae.atom.low_rank import LowRank
from writesae_study.codes.books import pursued


@torch.no_grad()
def test_a_pursuit_by_factors_is_that_of_the_matching_pursuit_sae() -> None:
    sizes: dict[str, Any] = {"d_in": 30, "d_sae": 16, "d_k": 5, "d_v": 6, "dtype": "float64", "b_dec_init": "zeros"}
    sae, x = untrained_sae("writesae_matching_pursuit", k=3, **sizes), torch.randn(9, 30, dtype=torch.float64)
    rest = (x - sae.b_dec).view(9, sae.cfg.d_k, -1)
    by_factors = pursued(LowRank.svd(rest), [sae.atoms()] * 3, positive=True)
    torch.testing.assert_close(by_factors.dense().flatten(1), sae(x) - sae.b_dec, rtol=1e-10, atol=1e-10)
