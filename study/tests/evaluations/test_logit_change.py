"""Logit change: small edits are predicted, and verdicts of tables whose answers are known."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from made_up import logit_cells
from saes import random_sae
from tiny_models import VOCAB, hooked_in_float64

from writesae_study.evaluations.logit_change import LogitChange
from writesae_study.experiment.evaluation import Result

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


# -- measuring


@float64
def test_small_edits_are_predicted() -> None:
    model = tiny("qwen3_5")
    how = SMALL | {"n_atoms": 6, "eps": (1e-5, 3e-5)}
    small = LogitChange(**how).run(model, random_sae(model, 24), TOKENS, progress=False)
    finding = small.findings()[2]
    assert finding.effect is not None and finding.effect.mean > 0.999 and finding.verdict.outcome == "holds"


# -- judging, on tables whose answers are known


def made_result(cells: pd.DataFrame, floor: float = 1e-9, rule: str = "Gated DeltaNet") -> Result:
    evaluation = LogitChange(horizons=(0, 4), ranks=((1, 1), (50, 50)), eps=(0.1, 1.0))
    return Result(evaluation, {"rule": rule, "floor": floor, "label": "made up"}, {"cells": cells})


def test_a_horizon_above_the_floor_is_held_against_f2() -> None:
    cells = logit_cells()
    late = cells["horizon"] == 4
    cells.loc[late, "measured"] = 1e-12 * np.random.default_rng(0).normal(size=int(late.sum()))
    cells.loc[late, "F2"] = 0.0
    assert made_result(cells).claims()[2].outcome == "holds"
    assert made_result(cells, floor=1e-15).claims()[2].outcome == "fails"


def test_a_derivative_is_compared_with_changes_of_the_smallest_step() -> None:
    """There they are 1.1 times as large as it says, and at the largest step twice."""
    effect = made_result(logit_cells(curve=1.0)).findings()[2].effect
    assert effect is not None and effect.mean == pytest.approx(1 - (0.1 / 1.1) ** 2, abs=1e-3)
