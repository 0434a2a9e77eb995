"""Fits of predictions, on made-up numbers whose answers are known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from writesae.verdict.fits import (
    cell_r2,
    groups_of,
    linear_fit,
    one_scale,
    per_cell_table,
    r2_estimate,
    scale_cells,
    scores_table,
    with_control,
)

SCORED = ("F1", "F2", "shuffled")


def made_up(curve: float = 0.0) -> pd.DataFrame:
    """Cells whose change is `s eps + curve s eps^2`, with F2 = s eps and F1 = F2 / 2."""
    rng = np.random.default_rng(0)
    index = pd.MultiIndex.from_product(
        [["log_prob", "logit"], range(40), [0, 4], ["1", "50"]], names=["quantity", "firing", "horizon", "rank"]
    )
    slope = rng.normal(size=len(index))
    frames = [
        index.to_frame(index=False).assign(
            eps=eps, F1=eps * slope / 2, F2=eps * slope, measured=slope * eps * (1 + curve * eps)
        )
        for eps in (0.1, 1.0)
    ]
    cells = pd.concat(frames, ignore_index=True)
    return with_control(cells.assign(sequence=cells["firing"] // 4), "F2", 0)


def test_scores_known_by_hand() -> None:
    cells = made_up()
    table = scores_table(cells, SCORED).set_index(["quantity", "predictor", "horizon", "rank", "eps"])
    assert set(table.index.get_level_values("predictor")) == set(SCORED)
    exact, half = (table.loc[("logit", p, "all", "all", "0.1")] for p in ("F2", "F1"))
    assert exact["r2"] == exact["r2_low"] == exact["r2_high"] == exact["sign_rate"] == exact["global_scale"] == 1
    rows = cells.query("quantity == 'logit' and eps == 0.1")
    m = rows["measured"].to_numpy()
    assert half["r2"] == pytest.approx(1 - 0.25 * (m**2).sum() / ((m - m.mean()) ** 2).sum())
    assert half["r2_low"] < half["r2"] < half["r2_high"] and half["global_scale"] == pytest.approx(2)
    assert half["r2_global_scale"] == pytest.approx(1) and half["pearson"] == pytest.approx(1)
    assert half["n"] == len(m) == 160 and half["n_sequences"] == 10
    shuffled = table.loc[("logit", "shuffled", "all", "all", "0.1")]
    assert shuffled["r2"] < 0 and shuffled["per_cell_scale"] == pytest.approx(1)
    lead = r2_estimate(m, rows["F1"], rows["sequence"], rival=rows["shuffled"])
    assert lead.mean == pytest.approx(half["r2"] - shuffled["r2"]) and 0 < lead.low < lead.mean < lead.high
    assert (lead.n, lead.n_clusters) == (160, 10)


def test_r2_of_a_cell_by_hand() -> None:
    """Measured 1 and 3 at sizes 1 and 2 of a line: the scale 7/5 leaves 0.4^2 + 0.2^2 of a variation of 2."""
    cell = {"quantity": "logit", "horizon": 0, "rank": "1", "sequence": 7}
    steps = pd.DataFrame([{"eps": 1.0, "F2": 1.0, "measured": 1.0}, {"eps": 2.0, "F2": 2.0, "measured": 3.0}])
    cells = pd.concat([steps.assign(firing=0, **cell), steps.assign(firing=1, **cell | {"quantity": "log_prob"})])
    cells = cells.reset_index(drop=True).assign(F1=0.0)
    cells.loc[cells["quantity"] == "log_prob", "measured"] *= 10
    assert cell_r2(cells, "F2").to_numpy().tolist() == [[pytest.approx(1 - 0.2 / 2), 7]]
    assert scale_cells(cells, "F1").tolist() == [0] * 4  # nothing to scale
    assert cell_r2(cells.assign(measured=lambda rows: rows["measured"] / 10), "F2")["r2"].tolist() == [
        pytest.approx(0.9)
    ]
    constant = scores_table(cells.assign(F2=1.0), ["F2"]).query("quantity == 'logit' and horizon == 'all'")
    assert constant["pearson"].iloc[0] == 0
    small = scores_table(cells.assign(F2=cells["F2"] / 10), ["F2"]).query("quantity == 'logit' and horizon == 'all'")
    assert small["pearson"].iloc[0] == pytest.approx(1)


def test_groups_without_change_are_left_out() -> None:
    still = made_up().assign(measured=0.0)
    assert scores_table(still, SCORED).empty and per_cell_table(still, SCORED).empty
    assert sum(1 for _ in groups_of(still)) == 2 * (1 + 2 + 2 + 2 + 4)


def test_a_scale_per_cell_hides_the_predictor() -> None:
    """On a curved response every predictor, right or wrong, gets one and the same number."""
    table = per_cell_table(made_up(curve=0.5), SCORED).query("quantity == 'logit'")
    assert table["median_r2"].max() - table["median_r2"].min() < 1e-12 and 0.9 < table["median_r2"].iloc[0] < 1


def test_the_global_scale_is_fitted_on_the_other_half() -> None:
    predicted, sequence = np.ones(4), np.array([0, 0, 1, 1])
    fit = one_scale(np.array([1.0, 1.0, 3.0, 3.0]), predicted, sequence)
    assert fit.scale == 2 and fit.predicted.tolist() == [3, 3, 1, 1]
    assert one_scale(np.ones(4), np.zeros(4), sequence).scale == 0


def test_fits_do_not_depend_on_the_order_of_rows() -> None:
    rng = np.random.default_rng(0)
    measured, predicted, clusters = rng.normal(size=60), rng.normal(size=60), np.arange(60) // 5
    order = rng.permutation(60)
    groups, features = np.arange(60) % 2, predicted[:, None]
    one, again = (one_scale(measured[rows], predicted[rows], clusters[rows]) for rows in (np.arange(60), order))
    np.testing.assert_allclose(again.predicted, one.predicted[order])
    whole = linear_fit(measured, features, clusters, groups)
    again = linear_fit(measured[order], features[order], clusters[order], groups[order])
    np.testing.assert_allclose(again, whole[order])


def test_the_control_keeps_horizon_rank_and_eps_and_changes_the_firing() -> None:
    for _, part in made_up().groupby(["quantity", "horizon", "rank", "eps"]):
        assert sorted(part["shuffled"]) == sorted(part["F2"]) and (part["shuffled"] != part["F2"]).all()


def test_a_linear_fit_never_sees_the_half_that_it_predicts() -> None:
    rng = np.random.default_rng(0)
    features, clusters, groups = rng.normal(size=(400, 2)), np.arange(400) // 20, np.arange(400) % 2
    truth = np.where(groups == 0, features @ [1.0, -2.0], features @ [0.0, 3.0])
    np.testing.assert_allclose(linear_fit(truth, features, clusters, groups), truth)
    changed = truth.copy()
    changed[clusters % 2 == 1] = rng.normal(size=200)  # the odd half predicts the even one, and not itself
    predicted = linear_fit(changed, features, clusters, groups)
    np.testing.assert_allclose(predicted[clusters % 2 == 1], truth[clusters % 2 == 1])
    one = linear_fit(truth, features[:, :1], clusters, np.zeros(400))
    np.testing.assert_allclose(one, one_scale(truth, features[:, 0], clusters).predicted)
