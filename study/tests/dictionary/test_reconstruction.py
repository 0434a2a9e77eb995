"""Reconstruction against dense matrices, and a laboratory that is seen with one of its dictionaries."""

from __future__ import annotations

import numpy as np
import pytest
from saes import HOOK, STATE, exact_sae, make_sae
from torch import Tensor

from hookpoints import HookedRecurrent
from writesae.experiment.lab import Trial
from writesae_study.dictionary.reconstruction import NO_VARIANCE, reconstruction
from writesae_study.experiment.bench import Bench
from writesae_study.experiment.readout import kl_window

pytestmark = pytest.mark.usefixtures("no_grad")


def test_an_exact_dictionary_explains_everything(model: HookedRecurrent, short_text: Tensor) -> None:
    table = reconstruction(Bench(model, {"write": exact_sae(HOOK), "state": exact_sae(STATE)}, short_text), range(6))
    assert sorted(zip(table["sae"], table["sequence"])) == [(sae, n) for sae in ("state", "write") for n in range(6)]
    np.testing.assert_allclose(table[["explained", "reads"]], 1, atol=1e-6)
    assert (table["l0"] > 1).all()


def test_sequences_without_variance_are_left_out_and_counted(model: HookedRecurrent, short_text: Tensor) -> None:
    lab = Bench(model, {"a": make_sae(model)}, short_text[:1, :1].expand(3, 1))  # one token: one write, the mean of all
    assert reconstruction(lab, range(3)).empty and lab.skipped[NO_VARIANCE] == 3


def test_a_view_of_one_dictionary_shares_counts_and_firings(model: HookedRecurrent, short_text: Tensor) -> None:
    lab = Bench(model, {"a": make_sae(model), "b": exact_sae(STATE)}, short_text)
    view = lab.only("b")
    assert list(view.saes) == ["b"] and view.hook.target == "state" and lab.hook.target == "write"
    view.facts["n"], view.skipped["why"] = 1, 2
    assert lab.facts == {} and lab.skipped["why"] == 2
    assert view.firings() is lab.firings("b")
    site = view.site(0)
    view.read(site, [Trial({}, 3, view.replace(3, None))], kl_window, 4)
    assert lab.counts["runs"] == view.counts["runs"] == 1
    before = lab.counts["runs"]
    view.floor(kl_window, "kl", 4)
    assert lab.counts["runs"] == before
