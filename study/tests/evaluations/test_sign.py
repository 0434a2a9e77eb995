"""The sign test against the formula, and tables of a linear readout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from saes import HEAD, LAYER, muted, random_sae
from torch import Tensor

from hookpoints import HookedRecurrent
from sae_lens_writesae.errors import NothingToMeasureError
from writesae_study.evaluations.sign import Sign
from writesae_study.experiment.evaluation import Result


def run(model: HookedRecurrent, prompt_text: Tensor, **changes: Any) -> Result:
    small: dict[str, Any] = {"n_positions": 6, "ranks": ((1, 10), (11, 60)), "sizes": (1e-4,), "first_position": 3}
    return Sign(**small | changes).run(model, random_sae(model), prompt_text, progress=False)


def test_the_logit_of_a_small_write_turns_with_its_sign_and_is_predicted(
    model64: HookedRecurrent, prompt_text: Tensor
) -> None:
    """At small m the readout is linear: F2 is right in sign and size, and the two signs of m are opposite."""
    small = run(model64, prompt_text)
    table = small.tables["writes"]
    assert len(table) == small.info["n_edited_runs"] == 6 * 2 * 4 * 2  # positions, ranks, directions, signs
    up, down = (table[table["m"] * sign > 0]["measured"].to_numpy() for sign in (1, -1))
    np.testing.assert_allclose(up, -down, rtol=0.02, atol=1e-9)
    np.testing.assert_allclose(table["f2"], table["measured"], rtol=0.02, atol=1e-9)
    assert small.claims()[0].n == 6 * 2  # positions, ranks
    assert small.label == f"L{LAYER}H{HEAD}"  # not named after a dictionary, whose atoms are not used
    assert 0 <= float(small.info["floor"]) < 1e-9  # float64


def test_a_head_that_writes_nothing_is_refused(model64: HookedRecurrent, prompt_text: Tensor) -> None:
    with muted(model64, 21), pytest.raises(NothingToMeasureError, match=r"6 \(positions"):
        run(model64, prompt_text)


def linear(right: float, wrong: float, random: float = 0.5, flip: int = 1, n: int = 200, seed: Any = 0) -> Result:
    """A linear readout: the logit moves by `flip` times what F0 says on a share of writes, else the other way."""
    shares, rng = {"direct": right, "gradient": right, "random": random, "wrong": wrong}, np.random.default_rng(seed)
    names = ["position", "m", "direction"]
    rows = pd.MultiIndex.from_product([range(n), (1.0, -1.0), shares], names=names).to_frame(index=False)
    is_right = rng.random(len(rows)) < rows["direction"].map(shares)
    moved = 0.5 * rows["m"] * flip * np.where(is_right, 1, -1)
    rows = rows.assign(sequence=rows["position"] // 4, token=1, measured=moved, f2=moved, aimed=rows["m"])
    return Result(Sign(), {"label": "x", "floor": 1e-6}, {"writes": rows})
