"""The spread of a substitution over the next tokens: what a no-op leaves, and verdicts of known tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from sae_lens import SAE
from saes import random_sae
from torch import Tensor

from writesae_study.evaluations.multistep import Multistep
from writesae_study.experiment.evaluation import Result

SMALL: dict[str, Any] = {"n_steps": 4, "scale": "matched", "controls": ("mean",), "n_atoms": 3, "firings_per_atom": 2}


def test_a_no_op_changes_nothing_and_every_condition_is_followed(model64: Any, varied: Tensor) -> None:
    result = Multistep(**SMALL).run(model64, random_sae(model64), varied, progress=False)
    steps = result.tables["steps"]
    noop = steps[steps["condition"] == "native"]
    assert noop["state_gap"].max() < 1e-12 and noop["residual_cosine"].min() > 1 - 1e-12
    assert steps["step"].max() == 4 and set(steps["condition"]) == {"native", "delete", "atom", "mean"}
    assert (steps.groupby(["firing", "condition", "scale"]).size() == 5).all()
    assert steps.loc[steps["condition"] == "delete", "state_gap"].gt(0).all()
    assert result.info["n_edited_runs"] == len(steps) / 5
    assert result.claims()[0].outcome == "inconclusive"  # 6 firings


def test_atoms_that_are_the_writes_move_nothing(model64: Any, planted: SAE, equal_rows: Tensor) -> None:
    result = Multistep(**SMALL).run(model64, planted, equal_rows, progress=False)
    moved = result.tables["steps"].assign(turned=lambda table: 1 - table["residual_cosine"])
    largest = moved.groupby("condition")[["state_gap", "turned"]].max()
    assert largest.loc[["atom"]].to_numpy().max() < 1e-6 < 1e-4 < largest.loc[["delete", "mean"]].to_numpy().min()


def known(measured: dict[str, float], n: int = 24) -> Result:
    """Firings whose distance and state gap have these sizes, by condition."""
    sizes, rng = {"native": 1e-8} | measured, np.random.default_rng(0)
    steps = pd.MultiIndex.from_product([range(n), sizes, (0, 1)], names=["firing", "condition", "step"])
    steps = steps.to_frame(index=False).assign(size=lambda t: t["condition"].map(sizes))
    gap = steps["size"] * rng.uniform(0.9, 1.1, len(steps))
    steps = steps.assign(sequence=steps["firing"] // 3, residual_cosine=1 - steps["size"], state_gap=gap)
    evaluation = Multistep(**SMALL | {"controls": tuple(name for name in measured if name not in ("atom", "delete"))})
    return Result(evaluation, {"label": "x"}, {"steps": steps})
