"""What kind of dictionary an SAE is: its variant, and its objective."""

from __future__ import annotations

import pytest
from saes import HOOK, STATE, exact_sae

from sae_lens_writesae.sae import INFERENCE, VARIANTS
from writesae_study.dictionary.traits import objective, variant


@pytest.mark.parametrize("name", VARIANTS)
def test_the_variant_is_read_from_the_fields(name: str) -> None:
    sae_class, config_class = INFERENCE["writesae_jumprelu"]
    assert variant(sae_class(config_class(d_in=48, d_k=8, d_sae=7, **VARIANTS[name]))) == name


def test_the_objective_is_read_from_the_metadata() -> None:
    assert objective(exact_sae(STATE)) == ("state", "mse")
    assert objective(exact_sae(STATE, loss="reads", seqpos_slice=(-1, None))) == ("last_state", "reads")
    assert objective(exact_sae(HOOK, loss="write", seqpos_slice=(None,))) == ("write", "write")
