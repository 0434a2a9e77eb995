"""What several codes of the writes of one head share."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from saes import random_low_rank
from torch.testing import assert_close

from sae_lens_writesae.atom.low_rank import LowRank
from writesae_study.codes.equal_bits import HeadWrites, n_atoms, product_quantizer, quantizer


def test_sides_are_keys_of_norm_1_and_the_values_that_belong_to_them(model: Any) -> None:
    """Their product is the write, of mean norm sqrt(K V), whatever the norms of native keys."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(300, 1, size, generator=generator) for size in (8, 6))
    native = LowRank(keys * torch.linspace(0.2, 5, 300)[:, None, None], values)
    writes = HeadWrites(model, (1, 2), native, None, most=1, steps=1, seed=0)
    k, u = (side.dense()[..., 0] for side in writes.sides)
    assert_close(k.norm(dim=1), torch.ones(300))
    scale = 48**0.5 / native.norm().mean()
    assert_close(torch.einsum("nk,nv->nkv", k, u), scale * native.dense(), rtol=1e-4, atol=1e-4)


def test_bits_are_those_of_the_choices_and_of_the_coefficients(model: Any) -> None:
    """A byte says which of 256 codes a step takes, and a byte its coefficient. Steps of two sides share one
    coefficient, for k u^T has one. Atoms of a TopK code have no order."""
    native = random_low_rank(1, 0, n=300).to(torch.zeros(()))
    writes = HeadWrites(model, (1, 2), native, None, most=2, steps=1, seed=0)
    found: Any = quantizer(writes, 2), product_quantizer(writes, 2)
    assert [code.bits for code in found] == [32, 24]
    for n in (1, 2, 4):
        assert math.log2(math.comb(n_atoms(n) + n - 1, n)) == pytest.approx(8 * n, rel=0.01)
