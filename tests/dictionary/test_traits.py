"""The size of a dictionary, and a flat one of the same size."""

from __future__ import annotations

from typing import Any

import pytest

from sae_lens_writesae.sae import INFERENCE, VARIANTS, WriteTopKSAE, WriteTopKSAEConfig
from writesae.dictionary.traits import matched_flat, n_parameters


@pytest.mark.parametrize("architecture", ["writesae_topk", "writesae_gated"])
@pytest.mark.parametrize("name", ["WriteSAE", "FlatSAE"])
@pytest.mark.parametrize("d_sae", [7, 512])
def test_a_matched_flat_sae_differs_by_half_an_atom_at_most(architecture: str, name: str, d_sae: int) -> None:
    sae_class, config_class = INFERENCE[architecture]
    more = {"k": 3} if architecture == "writesae_topk" else {}

    def build(**fields: Any) -> Any:
        return sae_class(config_class(d_in=48, d_k=8, **{**more, **fields}))

    sae = build(d_sae=d_sae, **VARIANTS[name])
    size, fields = matched_flat(sae)
    flat = build(d_sae=size, **fields)
    assert {"encoder": flat.cfg.encoder, "decoder": flat.cfg.decoder, "rank": 1} == VARIANTS["FlatSAE"]
    of_an_atom = (n_parameters(flat) - 48) / size
    assert abs(n_parameters(flat) - n_parameters(sae)) <= of_an_atom * (0.5 if size > 1 else 1)
    if name == "FlatSAE":
        assert size == d_sae
    if more:
        assert flat.cfg.k <= max(1, size // 2)


def test_the_papers_sizes_give_32_flat_atoms() -> None:
    config = WriteTopKSAEConfig(d_in=128 * 128, d_k=128, d_sae=2048, k=32, device="meta")
    assert matched_flat(WriteTopKSAE(config)) == (32, {"encoder": "dense", "decoder": "flat", "k": 16})
