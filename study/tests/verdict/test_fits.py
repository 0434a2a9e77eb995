"""Fits of predictions, on made-up numbers whose answers are known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from made_up import logit_cells

from writesae_study.verdict.fits import cell_r2, cross_fitted, r2_estimate


@pytest.fixture(scope="module")
def cells() -> pd.DataFrame:
    """Cells whose change is F2, and F1 half of it."""
    return logit_cells(first=0.5, noise=0.0)


def test_r2_of_a_cell_by_hand() -> None:
    """Measured 1 and 3 at sizes 1 and 2 of a line: the scale 7/5 leaves 0.4^2 + 0.2^2 of a variation of 2. The scale
    takes up the unit of a prediction; a cell that does not change has no R^2."""
    cell = pd.DataFrame({"firing": 0, "horizon": 0, "rank": "1", "sequence": 7, "F1": 0.0, "F2": [0.01, 0.02]})
    both = pd.concat([cell.assign(measured=[1.0, 3.0]), cell.assign(firing=1, measured=2.0)], ignore_index=True)
    assert cell_r2(both, "F2").to_numpy().tolist() == [[pytest.approx(1 - 0.2 / 2), 7]]
    assert cell_r2(both, "F1")["r2"].tolist() == [pytest.approx(1 - 10 / 2)]  # nothing to scale


def test_the_control_keeps_horizon_rank_and_eps_and_changes_the_firing(cells: pd.DataFrame) -> None:
    for _, part in cells.groupby(["horizon", "rank", "eps"]):
        assert sorted(part["shuffled"]) == sorted(part["F2"]) and (part["shuffled"] != part["F2"]).all()


def test_a_fit_never_sees_the_half_that_it_predicts_and_no_order_of_rows() -> None:
    """The even half follows a rule for each group, the odd half is noise: the even one predicts the odd one by rule."""
    assert cross_fitted(np.ones(4), np.zeros((4, 1)), [0, 0, 1, 1]).tolist() == [0] * 4
    rng = np.random.default_rng(0)
    features, clusters, groups = rng.normal(size=(400, 2)), np.arange(400) // 20, np.arange(400) % 2
    by_rule = np.where(groups == 0, features @ [1.0, -2.0], features @ [0.0, 3.0])
    odd, order = clusters % 2 == 1, rng.permutation(400)
    measured = np.where(odd, rng.normal(size=400), by_rule)
    predicted = cross_fitted(measured, features, clusters, groups)
    np.testing.assert_allclose(predicted[odd], by_rule[odd])
    again = cross_fitted(measured[order], features[order], clusters[order], groups[order])
    np.testing.assert_allclose(again, predicted[order])


def test_a_lead_of_r2_by_hand(cells: pd.DataFrame) -> None:
    rows = cells.query("eps == 0.1")
    measured, ids, half, shuffled = (rows[name] for name in ("measured", "sequence", "F1", "shuffled"))
    assert r2_estimate(measured, rows["F2"], ids) == (1, 1, 1, 160, 10)
    r2 = r2_estimate(measured, half, ids).mean
    assert r2 == pytest.approx(1 - ((measured / 2) ** 2).mean() / measured.var(ddof=0))
    lead = r2_estimate(measured, half, ids, rival=shuffled)
    assert lead.mean == pytest.approx(r2 - r2_estimate(measured, shuffled, ids).mean) and 0 < lead.low < lead.high
