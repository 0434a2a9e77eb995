"""Control dictionaries: the trained one's size, rule and activity, and atoms that nothing was learned for."""

from __future__ import annotations

import pytest
import torch
from saes import untrained_sae
from torch import Tensor
from torch.testing import assert_close

from sae_lens_writesae import sae as S
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.choices import Variant
from sae_lens_writesae.sae.matrix import MatrixSAE
from writesae_study.dictionary.controls import control_dictionary

K, V, F, N = 6, 5, 20, 300
ARCHITECTURES = ("writesae_topk", "writesae_jumprelu", "writesae_standard", "writesae_gated")
"""One for each way in which as many atoms are active."""
VARIANTS: dict[str, Variant] = {name: S.VARIANTS[name] for name in ("WriteSAE", "TiedSAE", "FlatSAE", "WriteSAE-rank2")}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WRITES = LowRank.rank_one(draw(N, K), draw(N, V, seed=1))
ROWS = WRITES.dense().flatten(1) + 0.3 * draw(K * V, seed=2)
"""[N,K*V] the writes, and a constant matrix underneath."""


def trained(architecture: str, **fields: object) -> MatrixSAE:
    """Not trained: only its weights, threshold and biases differ."""
    sae = untrained_sae(architecture, S.INFERENCE, k=2, seed=3, d_in=K * V, d_k=K, d_sae=F, **fields)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        if architecture == "writesae_jumprelu":
            sae.threshold.fill_(2.5)
        if architecture in ("writesae_standard", "writesae_gated"):
            (sae.b_enc if architecture == "writesae_standard" else sae.b_gate).sub_(2)
    return sae


def l0(sae: MatrixSAE) -> float:
    return float((sae.encode(ROWS) > 0).sum(1).float().mean())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_controls_are_alike_in_all_but_their_atoms(architecture: str, variant: str) -> None:
    sae = trained(architecture, **VARIANTS[variant])
    directions, nearest = torch.nn.functional.normalize(WRITES.dense().flatten(1), dim=1), []
    for control in (control_dictionary(sae, ROWS, WRITES), control_dictionary(sae, ROWS)):
        assert type(control) is type(sae) and not control.training
        assert {n: p.shape for n, p in control.named_parameters()} == {n: p.shape for n, p in sae.named_parameters()}
        assert l0(control) == pytest.approx(l0(sae), abs=0.01)
        assert_close(control.b_dec.data, ROWS.mean(0))
        assert_close(control.decoder_norm().data, torch.ones(F))
        assert_close(control.W_enc.T.data, control.W_dec.data)
        nearest.append((directions @ control.W_dec.data.T).max(0))
    assert_close(nearest[0].values, torch.ones(F))
    assert len(nearest[0].indices.unique()) == F  # drawn without repetition
    assert float(nearest[1].values.median()) < 0.9


@pytest.mark.parametrize("architecture", ["writesae_jumprelu", "writesae_standard", "writesae_gated"])
def test_controls_of_a_dead_dictionary_are_dead(architecture: str) -> None:
    sae = trained(architecture)
    with torch.no_grad():
        getattr(sae, "b_gate" if architecture == "writesae_gated" else "b_enc").fill_(-1e6)
    assert l0(sae) == l0(control_dictionary(sae, ROWS)) == l0(control_dictionary(sae, ROWS, WRITES)) == 0
