"""Reconstruction against dense matrices, and a laboratory that is seen with one of its dictionaries."""

from __future__ import annotations

import pytest
import torch
from saes import HEAD, HOOK, LAYER, STATE, K, V, exact_sae, make_sae
from torch import Tensor

from hookpoints import HookedRecurrent
from writesae.experiment.lab import Lab, Trial
from writesae.experiment.readout import kl_window
from writesae.experiment.reconstruction import NO_VARIANCE, reconstruction

pytestmark = pytest.mark.usefixtures("no_grad")


def test_an_exact_dictionary_explains_everything(model: HookedRecurrent, short_text: Tensor) -> None:
    table = reconstruction(Lab(model, {"write": exact_sae(HOOK), "state": exact_sae(STATE)}, short_text), range(6))
    for label in ("write", "state"):
        rows = table[table["sae"] == label]
        assert rows["sequence"].tolist() == [*range(6)]
        assert rows["explained"].to_numpy() == pytest.approx(1, abs=1e-6)
        assert rows["reads"].to_numpy() == pytest.approx(1, abs=1e-6)
        assert (rows["l0"] > 1).all()


@pytest.mark.parametrize("hook", [HOOK, STATE])
def test_shares_are_those_of_the_dense_matrices(model: HookedRecurrent, short_text: Tensor, hook: str) -> None:
    sae = make_sae(model, hook=hook)
    row = reconstruction(Lab(model, {"a": sae}, short_text), range(6)).iloc[2]
    one = model.recurrence(short_text, LAYER).select(heads=HEAD)
    x = (one.states() if "state" in hook else one.write())[:, :, 0].flatten(2)
    error = x[2] - sae.decode(sae.encode(x[2]))
    explained = 1 - error.square().sum() / (x[2] - x.mean((0, 1))).square().sum()
    assert row["explained"] == pytest.approx(float(explained), abs=1e-4)

    def read(rows: Tensor) -> float:
        return float(torch.stack([(e.view(K, V).T @ q).square().sum() for e, q in zip(rows, one.q[2, :, 0])]).sum())

    assert row["reads"] == pytest.approx(1 - read(error) / read(x[2]), abs=1e-4)


def test_sequences_without_variance_are_left_out_and_counted(model: HookedRecurrent, short_text: Tensor) -> None:
    lab = Lab(model, {"a": make_sae(model)}, short_text[:1, :1].expand(3, 1))  # one token: one write, the mean of all
    assert reconstruction(lab, range(3)).empty and lab.skipped[NO_VARIANCE] == 3


def test_a_view_of_one_dictionary_shares_counts_and_firings(model: HookedRecurrent, short_text: Tensor) -> None:
    lab = Lab(model, {"a": make_sae(model), "b": exact_sae(STATE)}, short_text)
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
