"""Objectives: a dictionary that loses nothing, and fixed verdicts."""

from __future__ import annotations

import pandas as pd
import pytest
from made_up import FAILS, made_up
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


def made(
    own: dict[str, float], base: dict[str, float] = FAILS, target: str = "state", n_sequences: int = 30, seed: int = 0
) -> Result:
    """A dictionary of writes with effects `own` beside one of `target` with `base`."""
    evaluation, tests = Objectives(), {}
    settings = {"scales": TESTED_SCALES, "controls": evaluation.controls, "n_sequences": n_sequences}
    for n, (label, medians) in enumerate({"new": own, "old": base}.items(), seed):
        tests[label] = (wide_firings(made_up(medians, floor=1e-11, seed=n, **settings)), 300)
    rows = [{"sae": "new", "target": "write"}, {"sae": "old", "target": target}]
    fits = pd.DataFrame([(each, n, 0.5, 0.5) for each in tests for n in range(3)])
    fits.columns = ["sae", "sequence", "explained", "reads"]
    tables = evaluation.tables(pd.DataFrame(rows).assign(loss="mse", d_sae=512, l0=3.0), tests, fits)
    return Result(evaluation, {"label": "made up"}, tables)
