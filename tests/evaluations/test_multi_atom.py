"""Writes replaced by parts of their code: exact codes, writes of no norm, and verdicts of known samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from saes import exact_sae, runner
from torch import Tensor

from writesae.evaluations.multi_atom import ALL, MultiAtom, rows_of
from writesae.experiment.evaluation import Result

run = runner(
    MultiAtom,
    **{
        "n_atoms": 4,
        "firings_per_atom": 1,
        "counts": (1, 3),
        "horizon": 3,
        "mean_write_sequences": 2,
    },
)


def test_an_exact_code_is_the_native_write_with_all_atoms_and_not_before(model64: Any, varied: Tensor) -> None:
    result = run(model64, exact_sae().double(), varied)
    every = rows_of(result, "code", "coefficient", ALL)
    assert (every["count"] == 48).all()  # one for each entry of 8 x 6
    np.testing.assert_allclose(every[["norm", "cosine"]], 1, atol=1e-6)
    assert every["kl"].abs().max() < 1e-10 < 1e-6 < rows_of(result, "code", "coefficient", 3)["kl"].median()
    noop = rows_of(result, "native")
    assert noop["kl"].abs().max() < 1e-10 and rows_of(result, "delete")["kl"].min() > 1e-6
    claim = result.claims()[0]
    assert claim.outcome == "inconclusive" and claim.n == len(noop) < 20 and claim.number is None
    assert result.info["n_edited_runs"] == len(result.tables["writes"])


def table(kl: dict[str, float], n: int = 24) -> Result:
    """Every write has the same KL under each condition, with one atom or all of two, but for a little noise."""
    rng, plain = np.random.default_rng(0), [{"scale": "none", "count": 0, "all": False}]
    steps = [{"scale": "coefficient", "count": count, "all": count == 2} for count in (1, 2)]
    rows = [
        {"sequence": place // 2, "position": place, "terms": 1, "kl_at": 0.1, "norm": 1.0, "cosine": 0.5}
        | {"condition": condition, "kl": value}
        | each
        for place in range(n)
        for condition, of in kl.items()
        for value in [of * np.exp(0.01 * rng.standard_normal())]
        for each in (plain if condition in ("native", "delete") else steps)
    ]
    evaluation = MultiAtom(scales=("coefficient",))
    return Result(evaluation, {"target": "write", "label": "x"}, {"writes": pd.DataFrame(rows)})
