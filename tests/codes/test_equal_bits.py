"""What several codes of the writes of one head share."""

from __future__ import annotations

from typing import Any

import torch
from torch.testing import assert_close

from sae_lens_writesae.atom.low_rank import LowRank
from writesae.codes.equal_bits import HeadWrites


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
