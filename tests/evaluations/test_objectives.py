"""Objectives: a dictionary that loses nothing, and fixed verdicts."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
from made_up import CONFOUNDED, FAILS, HOLDS, NO_EFFECT, made_up
from saes import STATE, exact_sae, make_sae
from torch import Tensor

from hookpoints import HookedRecurrent
from sae_lens_writesae.errors import NothingToMeasureError
from writesae.evaluations.objectives import TESTED_SCALES, Objectives
from writesae.experiment.at_firings import wide_firings
from writesae.experiment.evaluation import Result

pytestmark = pytest.mark.usefixtures("no_grad")

SMALL = Objectives(reconstruction_sequences=4, n_atoms=6, firings_per_atom=2, min_firings=1, horizon=4)


def test_the_exact_dictionary_wins_reconstruction(model: HookedRecurrent, short_text: Tensor) -> None:
    saes = {"exact": exact_sae(), "random": make_sae(model), "states": make_sae(model, hook=STATE)}
    result = SMALL.run(model, saes, short_text, progress=False)
    assert result.tables["dictionaries"]["target"].tolist() == ["write", "write", "state"]
    assert result.info["target"] == "write, state"
    contrasts = result.tables["contrasts"].set_index(["measure", "a", "b"])
    assert ("explained", "exact", "states") not in contrasts.index
    assert (contrasts.loc[[("explained", "exact", "random"), ("reads", "exact", "random")], "low"] > 0).all()
    for measure, a, b in contrasts.index:
        there, back = (contrasts.loc[(measure, *pair), "difference"] for pair in ((a, b), (b, a)))
        assert there == pytest.approx(-back)


def test_errors_name_the_fault(model: HookedRecurrent, short_text: Tensor) -> None:
    a = make_sae(model)
    with pytest.raises(NothingToMeasureError, match="only one atom"):
        SMALL.run(model, {"a": a, "b": a}, short_text[:1, :1].expand(3, 24), progress=False)


# -- verdicts


def made(own: dict[str, float], base: dict[str, float] = FAILS, target: str = "state", n_sequences: int = 30) -> Result:
    """A dictionary of writes with effects `own` beside one of `target` with `base`."""
    evaluation, tests = Objectives(), {}
    settings = {"scales": TESTED_SCALES, "controls": evaluation.controls, "n_sequences": n_sequences}
    for seed, (label, medians) in enumerate({"new": own, "old": base}.items()):
        tests[label] = (wide_firings(made_up(medians, floor=1e-11, seed=seed, **settings)), 300)
    rows = [{"sae": "new", "target": "write"}, {"sae": "old", "target": target}]
    fits = pd.DataFrame([(each, n, 0.5, 0.5) for each in tests for n in range(3)])
    fits.columns = ["sae", "sequence", "explained", "reads"]
    tables = evaluation.tables(pd.DataFrame(rows).assign(loss="mse", d_sae=512, l0=3.0), tests, fits)
    return Result(evaluation, {"label": "made up"}, tables)


@pytest.mark.parametrize(
    ("own", "base", "outcome"),
    [
        (HOLDS, FAILS, "holds"),
        (FAILS, HOLDS, "fails"),
        (HOLDS, HOLDS, "fails"),  # neither is ahead
        ({"delete": 1.0, "atom": 1.2}, {"delete": 1.0, "atom": 4.0}, "fails"),  # ahead, but no better than deletion
        (CONFOUNDED, FAILS, "confounded"),
        (NO_EFFECT, FAILS, "below the floor"),
        (HOLDS, NO_EFFECT, "below the floor"),
    ],
)
def test_verdicts_follow_the_rules(own: dict[str, float], base: dict[str, float], outcome: str) -> None:
    claim = made(own, base).claims()[0]
    assert claim.outcome == outcome, claim
    assert "states by mse" in claim.claim and claim.n == 480 and claim.unit == "firings of 40 atoms"


@pytest.mark.parametrize(
    ("changes", "outcome"), [({"n_sequences": 1}, "inconclusive"), ({"target": "last_state"}, "not tested")]
)
def test_few_firings_and_no_states_decide_nothing(changes: dict[str, Any], outcome: str) -> None:
    claim = made(HOLDS, FAILS, **changes).claims()[0]
    assert claim.outcome == outcome and "states by mse" in claim.claim + claim.sentence
