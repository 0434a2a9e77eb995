"""Whole-matrix replacement: by itself, and by exact dictionaries."""

from __future__ import annotations

import pytest
import torch
from saes import HOOK, STATE, K, V, exact_sae, make_sae
from torch import Tensor

from hookpoints import HookedRecurrent
from sae_lens_writesae.atom.low_rank import LowRank
from writesae_study.dictionary.replacement import Basis, replacement_costs
from writesae_study.experiment.bench import Bench
from writesae_study.head.components import fit_pca

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("hook", [HOOK, STATE])
def test_replacing_all_by_itself_changes_nothing(model: HookedRecurrent, short_text: Tensor, hook: str) -> None:
    saes = {"exact": exact_sae(hook), "other": make_sae(model, hook=hook)}
    nothing = LowRank(torch.zeros(1, 1, K), torch.zeros(1, 1, V))
    basis = Basis(fit_pca(LowRank.svd(torch.randn(9, K, V)), 2), nothing, torch.zeros(K * V))
    table = replacement_costs(Bench(model, saes, short_text[:1]), 0, basis)
    nats = table.set_index(["sae", "method"])["nats"]
    assert nats["", "itself"] == 0
    assert nats["exact", "dictionary"] == pytest.approx(0, abs=1e-6)
    plain = model(short_text[:1], return_type="loss")
    by_hook = model.run_with_hooks(
        short_text[:1], return_type="loss", fwd_hooks=[(hook, lambda x, hook: saes["other"](x))]
    )
    assert nats["other", "dictionary"] == pytest.approx(float(by_hook - plain), rel=1e-3, abs=1e-6) != 0
    assert nats["", "mean"] == nats["", "zero"]  # the mean that was given is zero
