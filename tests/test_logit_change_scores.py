"""Scores and verdicts of logit change, on made-up tables whose answers are known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from sae_lens_writesae.logit_change import LogitChange, LogitChangeConfig
from sae_lens_writesae.logit_change.scores import SCORED, one_scale, score, score_cells, unscored, with_control


def made_up(*, curve: float = 0.0, first: float = 0.0, noise: float = 1.0, size: float = 1.0) -> pd.DataFrame:
    """Cells whose change is `s eps + curve s eps^2` with F2 = s eps; F0 = first s eps + noise."""
    rng = np.random.default_rng(0)
    index = pd.MultiIndex.from_product(
        [["log_prob", "logit"], range(40), [0, 4], ["1", "50"]], names=["quantity", "firing", "horizon", "rank"]
    )
    slope = size * rng.normal(size=len(index))
    wrong = first * slope + noise * size * rng.normal(size=len(index))
    frames = []
    for eps in (0.1, 1.0):
        table = index.to_frame(index=False).assign(eps=eps, F0=eps * wrong, F1=eps * wrong, F2=eps * slope)
        frames.append(table.assign(measured=slope * eps * (1 + curve * eps)))
    cells = pd.concat(frames, ignore_index=True)
    extra = {"position": 3, "atom": 0, "unit": 1.0, "token": 1, "native_rank": 1}
    return with_control(cells.assign(sequence=cells["firing"] // 4, **extra), 0)


def made_result(cells: pd.DataFrame, floor: float = 1e-9, rule: str = "Gated DeltaNet") -> LogitChange:
    config = LogitChangeConfig(horizons=(0, 4), ranks=((1, 1), (50, 50)), eps=(0.1, 1.0)).to_dict()
    info = {"config": config, "rule": rule, "floor": floor, "label": "made up", "omitted": {"a reason": 3}}
    return LogitChange(info, {"cells": cells, "scores": score(cells), "per_cell": score_cells(cells)})


def outcomes(found: LogitChange) -> list[str]:
    return [claim.outcome for claim in found.claims()]


def test_verdicts() -> None:
    wrong = made_result(made_up())
    assert outcomes(wrong) == ["confounded", "fails", "holds"]
    assert "shuffled between firings reach 1.000 as well" in wrong.claims()[0].sentence
    assert wrong.notes()[-1] == "Left out: 3 (a reason)."
    assert outcomes(made_result(made_up(first=1, noise=0.1))) == ["holds", "holds", "holds"]
    curved = made_result(made_up(curve=10.0))
    assert outcomes(curved)[2] == "fails" and "eps^2.00" in curved.claims()[2].sentence
    assert outcomes(made_result(made_up(), floor=10.0)) == ["below the floor"] * 3
    jumping = made_up()  # what an eps-free change does: no scale per cell helps
    jumping["measured"] = np.random.default_rng(1).normal(size=len(jumping))
    assert outcomes(made_result(jumping)) == ["fails", "fails", "fails"]


def test_a_world_without_change_is_said_not_scored() -> None:
    still = made_up().assign(measured=0.0)
    found = made_result(still)
    assert found.tables["scores"].empty and unscored(still, found.tables["scores"]) == 2 * 4 * (1 + 2 + 2 + 2 + 4)
    assert outcomes(found) == ["below the floor"] * 3
    assert found.figures() == [] and found.notes() == ["Left out: 3 (a reason)."]


def test_a_horizon_below_the_floor_is_not_held_against_f2() -> None:
    cells = made_up()
    late = cells["horizon"] == 4
    cells.loc[late, "measured"] = 1e-12 * np.random.default_rng(0).normal(size=int(late.sum()))
    cells.loc[late, "F2"] = 0.0
    assert outcomes(made_result(cells))[2] == "holds"
    assert outcomes(made_result(cells, floor=1e-15))[2] == "fails"


def test_scores_known_by_hand() -> None:
    cells = made_up().assign(F1=lambda table: table["F2"] / 2)
    table = score(cells).set_index(["quantity", "predictor", "horizon", "rank", "eps"])
    assert set(table.index.get_level_values("predictor")) == set(SCORED)
    exact, half = (table.loc[("logit", p, "all", "all", "0.1")] for p in ("F2", "F1"))
    assert exact["r2"] == exact["r2_low"] == exact["r2_high"] == exact["sign_rate"] == exact["global_scale"] == 1
    m = cells.query("quantity == 'logit' and eps == 0.1")["measured"].to_numpy()
    assert half["r2"] == pytest.approx(1 - 0.25 * (m**2).sum() / ((m - m.mean()) ** 2).sum())
    assert half["r2_low"] < half["r2"] < half["r2_high"] and half["global_scale"] == pytest.approx(2)
    assert half["r2_global_scale"] == pytest.approx(1) and half["pearson"] == pytest.approx(1)
    assert half["n"] == len(m) == 160 and half["n_sequences"] == 10
    shuffled = table.loc[("logit", "shuffled", "all", "all", "0.1")]
    assert shuffled["r2"] < 0 and shuffled["per_cell_scale"] == pytest.approx(1)


def test_a_scale_per_cell_hides_the_predictor() -> None:
    """On a curved response every predictor, right or wrong, gets one and the same number."""
    table = score_cells(made_up(curve=0.5)).query("quantity == 'logit'")
    assert table["median_r2"].max() - table["median_r2"].min() < 1e-12 and 0.9 < table["median_r2"].iloc[0] < 1


def test_the_global_scale_is_fitted_on_the_other_half() -> None:
    predicted, sequence = np.ones(4), np.array([0, 0, 1, 1])
    fit = one_scale(np.array([1.0, 1.0, 3.0, 3.0]), predicted, sequence)
    assert fit.scale == 2 and fit.predicted.tolist() == [3, 3, 1, 1]
    assert one_scale(np.ones(4), np.zeros(4), sequence).scale == 0


def test_the_control_keeps_horizon_rank_and_eps_and_changes_the_firing() -> None:
    cells = made_up()
    keys = ["quantity", "horizon", "rank", "eps"]
    for _, part in cells.groupby(keys):
        assert sorted(part["shuffled"]) == sorted(part["F2"]) and (part["shuffled"] != part["F2"]).all()
