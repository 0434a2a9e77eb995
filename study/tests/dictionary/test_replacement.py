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
def test_replacing_costs_what_a_hook_that_does_so_costs(model: HookedRecurrent, short_text: Tensor, hook: str) -> None:
    text, saes = short_text[:1], {"exact": exact_sae(hook), "other": make_sae(model, hook=hook)}
    writes = LowRank.rank_one(torch.randn(9, K), torch.randn(9, V))
    basis = Basis(fit_pca(writes, 2), writes.rows([0]), torch.zeros(K * V))
    nats = replacement_costs(Bench(model, saes, text), 0, basis).set_index(["sae", "method"])["nats"]
    assert nats["", "itself"] == 0 != nats["", "mean"] == nats["", "zero"]  # of a mean that is zero
    assert nats["exact", "dictionary"] == pytest.approx(0, abs=1e-6)
    replaced = model.run_with_hooks(text, return_type="loss", fwd_hooks=[(hook, lambda x, hook: saes["other"](x))])
    cost = float(replaced - model(text, return_type="loss"))
    assert nats["other", "dictionary"] == pytest.approx(cost, rel=1e-3, abs=1e-6) != 0
