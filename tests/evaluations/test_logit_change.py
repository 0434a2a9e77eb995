"""Logit change: small edits are predicted, batches change nothing, and verdicts of tables whose answers are known."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import VOCAB, KeepFloat64, hooked_in_float64
from saes import random_sae
from torch import Tensor

from hookpoints import HookedRecurrent
from writesae.evaluations.logit_change import SCORED, LogitChange
from writesae.experiment.evaluation import Result
from writesae.verdict.fits import scores_table, with_control

SMALL: dict[str, Any] = {
    "n_atoms": 3,
    "firings_per_atom": 2,
    "horizons": (0, 3),
    "ranks": ((1, 1), (2, 5)),
    "eps": (1e-5, 1e-4),
    "first_position": 4,
}

float64 = pytest.mark.usefixtures("_keep_float64")

tiny = lru_cache(maxsize=4)(partial(hooked_in_float64, backend="recurrence"))


TOKENS = torch.randint(1, VOCAB, (8, 24), generator=torch.Generator().manual_seed(1))


def run(model: HookedRecurrent, sae: Any = None, tokens: Tensor | None = None, **changes: Any) -> Result:
    dictionary = random_sae(model, 24) if sae is None else sae
    text = TOKENS[:3] if tokens is None else tokens
    return LogitChange(**SMALL | changes).run(model, dictionary, text, progress=False)


@pytest.fixture(scope="module")
def result() -> Result:
    with KeepFloat64():
        return run(tiny("mamba2"))


# -- measuring


def r2(result: Result, predictor: str, eps: float, horizon: str = "all") -> float:
    rows = result.tables["scores"].query("predictor == @predictor and horizon == @horizon and rank == 'all'")
    return rows.set_index("eps")["r2"][f"{eps:g}"]


@float64
@pytest.mark.parametrize(("kind", "eps"), [("qwen3_5", 1e-5)])
def test_small_edits_are_predicted(kind: str, eps: float) -> None:
    model = tiny(kind)
    small = run(model, random_sae(model, 24), TOKENS, n_atoms=6, eps=(eps, 3 * eps))
    assert r2(small, "F2", eps) > 0.999 and small.claims()[2].outcome == "holds"


@float64
def test_batches_and_inference_mode_change_nothing_and_nothing_is_left_behind(result: Result) -> None:
    model = tiny("mamba2")
    with torch.inference_mode():
        again = run(model, rows_per_run=1).tables["cells"]
    pd.testing.assert_frame_equal(again, result.tables["cells"], rtol=1e-5, atol=1e-13)
    assert all(parameter.grad is None for parameter in model.hf_model.parameters())
    assert not any(len(point.fwd_hooks) for point in model.hook_dict.values())


# -- judging, on tables whose answers are known


def made_up(*, curve: float = 0.0, first: float = 0.0, noise: float = 1.0) -> pd.DataFrame:
    """Cells whose change is `s eps + curve s eps^2` with F2 = s eps; F0 = first s eps + noise."""
    rng = np.random.default_rng(0)
    index = pd.MultiIndex.from_product([range(40), [0, 4], ["1", "50"]], names=["firing", "horizon", "rank"])
    slope = rng.normal(size=len(index))
    wrong = first * slope + noise * rng.normal(size=len(index))
    frames = (
        index.to_frame(index=False).assign(
            eps=eps, F0=eps * wrong, F1=eps * wrong, F2=eps * slope, measured=slope * eps * (1 + curve * eps)
        )
        for eps in (0.1, 1.0)
    )
    cells = pd.concat(frames, ignore_index=True)
    return with_control(cells.assign(sequence=cells["firing"] // 4, position=3), "F2", 0)


def made_result(cells: pd.DataFrame, floor: float = 1e-9, rule: str = "Gated DeltaNet") -> Result:
    evaluation = LogitChange(horizons=(0, 4), ranks=((1, 1), (50, 50)), eps=(0.1, 1.0))
    tables = {"cells": cells, "scores": scores_table(cells, SCORED)}
    return Result(evaluation, {"rule": rule, "floor": floor, "label": "made up"}, tables)


def outcomes(result: Result) -> list[str]:
    """Of F0, F1 and F2."""
    return [claim.outcome for claim in result.claims()][:3]


@pytest.mark.parametrize(
    "cells, rule, expected",
    [
        (made_up(first=2.0, noise=0.1), "Gated DeltaNet", {22: "holds"}),  # a factor of 2 is what a scale is for
        (made_up(first=0.3, noise=1.0), "Mamba-2", {22: "fails", 23: "fails"}),  # F0 is mostly noise
        (made_up(noise=1.0).assign(F1=lambda t: 3 * t["measured"]), "Mamba-2", {22: "fails", 23: "holds"}),
        (made_up(first=1.0, noise=0.0).assign(shuffled=lambda t: t["F2"]), "Mamba-2", {22: "confounded"}),
    ],
)
def test_the_rebuttals_numbers_are_held_out(cells: pd.DataFrame, rule: str, expected: dict[int, str]) -> None:
    result = made_result(cells, rule=rule)
    found = {claim.number: claim for claim in result.claims() if claim.number in (22, 23)}
    assert (23 in found) == (rule == "Mamba-2")
    assert {number: found[number].outcome for number in expected} == expected
    assert "10 of the rebuttal's 5,000" in found[22].measured


JUMPING = np.random.default_rng(1).normal(size=320)
"""What an eps-free change does: no scale per cell helps."""


@pytest.mark.parametrize(
    "cells, floor, expected",
    [
        (made_up(), 1e-9, ["confounded", "fails", "holds"]),
        (made_up(first=1, noise=0.1), 1e-9, ["holds", "holds", "holds"]),
        (made_up(curve=10.0), 1e-9, ["confounded", "fails", "fails"]),
        (made_up(), 10.0, ["below the floor"] * 3),
        (made_up().assign(measured=JUMPING), 1e-9, ["fails", "fails", "fails"]),
        (made_up().query("sequence < 4"), 1e-9, ["inconclusive"] * 3),
    ],
)
def test_verdicts(cells: pd.DataFrame, floor: float, expected: list[str]) -> None:
    assert outcomes(made_result(cells, floor)) == expected


def test_a_horizon_above_the_floor_is_held_against_f2() -> None:
    cells = made_up()
    late = cells["horizon"] == 4
    cells.loc[late, "measured"] = 1e-12 * np.random.default_rng(0).normal(size=int(late.sum()))
    cells.loc[late, "F2"] = 0.0
    assert outcomes(made_result(cells))[2] == "holds"
    assert outcomes(made_result(cells, floor=1e-15))[2] == "fails"


# -- bad input


@float64
def test_ranks_beyond_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="64 tokens"):
        run(tiny("mamba2"), ranks=((1, 1), (60, 65)))
