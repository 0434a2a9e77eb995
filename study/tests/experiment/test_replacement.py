"""Whole-matrix replacement: by itself, and by exact dictionaries."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import pytest
import torch
from sae_lens import SAE
from saes import HOOK, STATE, K, V, exact_sae, make_sae
from torch import Tensor

from hookpoints import HookedRecurrent
from sae_lens_writesae.atom.low_rank import LowRank
from writesae_study.dictionary.reconstruction import Basis, replacement_costs
from writesae_study.experiment.bench import Bench
from writesae_study.head.components import fit_pca

pytestmark = pytest.mark.usefixtures("no_grad")


def costs(
    model: HookedRecurrent, saes: Mapping[str, SAE], short_text: Tensor, state_ranks: tuple[int, ...]
) -> pd.DataFrame:
    nothing = LowRank(torch.zeros(1, 1, K), torch.zeros(1, 1, V))
    basis = Basis(fit_pca(LowRank.svd(torch.randn(9, K, V)), 2), nothing, torch.zeros(K * V))
    return replacement_costs(Bench(model, saes, short_text), 0, basis, (2,), state_ranks)


@pytest.mark.parametrize("hook", [HOOK, STATE])
def test_replacing_all_by_itself_changes_nothing(model: HookedRecurrent, short_text: Tensor, hook: str) -> None:
    saes = {"exact": exact_sae(hook), "other": make_sae(model, hook=hook)}
    table = costs(model, saes, short_text[:1], (1, 2, V))
    kind = "state" if hook == STATE else "write"
    nats = table[table["hook"] == kind].set_index(["sae", "method"])["nats"]
    assert nats["", "itself"] == 0
    assert nats["exact", "dictionary"] == pytest.approx(0, abs=1e-6)
    plain = model(short_text[:1], return_type="loss")
    by_hook = model.run_with_hooks(
        short_text[:1], return_type="loss", fwd_hooks=[(hook, lambda x, hook: saes["other"](x))]
    )
    assert nats["other", "dictionary"] == pytest.approx(float(by_hook - plain), rel=1e-3, abs=1e-6) != 0
    assert nats["", "mean"] == nats["", "zero"]  # the mean that was given is zero
    ranks = table.loc[(table["hook"] == "state") & table["method"].str.startswith("rank"), "method"]
    assert ranks.tolist() == ["rank 1", "rank 2"]  # V is the full rank
    assert (("", "pca 2") in nats.index) == (kind == "write")
