"""The spread of a substitution over the next tokens: what a no-op leaves, and verdicts of known tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from sae_lens import SAE
from torch import Tensor

from hookpoints import HookedRecurrent
from writesae_study.evaluations.multistep import Multistep
from writesae_study.experiment.evaluation import Result

SMALL: dict[str, Any] = {"n_steps": 4, "scale": "matched", "controls": ("mean",), "n_atoms": 3, "firings_per_atom": 2}


def test_every_condition_is_followed_and_only_what_writes_as_the_head_does_moves_nothing(
    model64: HookedRecurrent, planted: SAE, equal_rows: Tensor
) -> None:
    """A no-op, and atoms that are the writes."""
    result = Multistep(**SMALL).run(model64, planted, equal_rows, progress=False)
    steps = result.tables["steps"].assign(turned=lambda table: 1 - table["residual_cosine"])
    assert (steps.groupby(["firing", "condition", "scale"]).size() == 5).all()
    assert result.info["n_edited_runs"] == len(steps) / 5
    largest = steps.groupby("condition")[["state_gap", "turned"]].max().T
    assert {*largest} == {"native", "delete", "atom", "mean"} and largest["native"].max() < 1e-12
    assert largest["atom"].max() < 1e-6 < 1e-4 < largest[["delete", "mean"]].min().min()


def known(measured: dict[str, float], n: int = 24) -> Result:
    """Firings whose distance and state gap have these sizes, by condition."""
    sizes, rng = {"native": 1e-8} | measured, np.random.default_rng(0)
    steps = pd.MultiIndex.from_product([range(n), sizes, (0, 1)], names=["firing", "condition", "step"])
    steps = steps.to_frame(index=False).assign(size=lambda t: t["condition"].map(sizes))
    gap = steps["size"] * rng.uniform(0.9, 1.1, len(steps))
    steps = steps.assign(sequence=steps["firing"] // 3, residual_cosine=1 - steps["size"], state_gap=gap)
    evaluation = Multistep(**SMALL | {"controls": tuple(name for name in measured if name not in ("atom", "delete"))})
    return Result(evaluation, {"label": "x"}, {"steps": steps})
