"""The spread of a substitution over the next tokens, against states and residual streams of full forwards."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from saes import HEAD, LAYER, random_sae
from torch import Tensor

from writesae.evaluations.multistep import Multistep
from writesae.experiment.evaluation import Result

SMALL: dict[str, Any] = {"n_steps": 4, "scale": "matched", "controls": ("mean",), "n_atoms": 3, "firings_per_atom": 2}


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(1, 64, (3, 40), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def result(model64: Any, tokens: Tensor) -> Result:
    return Multistep(**SMALL).run(model64, random_sae(model64), tokens, progress=False)


def test_deletion_follows_the_model(model64: Any, tokens: Tensor, result: Result) -> None:
    """States and residual stream of a full forward in which hook_write gives 0 at t."""
    steps = result.tables["steps"]
    one = steps[(steps["condition"] == "delete") & (steps["firing"] == 1)]
    t, sequence = int(one["position"].iloc[0]), tokens[int(one["sequence"].iloc[0])][None]
    head, last = f"blocks.{LAYER}.mixer.heads.{HEAD}.", f"blocks.{model64.cfg.n_layers - 1}.hook_resid_post"

    def silence(writes: Tensor, hook: Any) -> Tensor:
        writes = writes.clone()
        writes[0, t] = 0
        return writes

    with torch.no_grad():
        _, native = model64.run_with_cache(sequence, names_filter=[head + "hook_state", last])
        with model64.hooks(fwd_hooks=[(head + "hook_write", silence)]):
            _, edited = model64.run_with_cache(sequence, names_filter=[last])
        # the state itself, by the rule: S_t = (diag(alpha) + a b^T) S_{t-1} + k u^T without the write at t
        recurrence = model64.recurrence(sequence, LAYER).select(heads=slice(HEAD, HEAD + 1))
        u = recurrence.u.clone()
        u[0, t] = 0
        states = recurrence.replace(u=u).states()[0, :, 0]
    stretch = slice(t, t + 5)
    native_states = native[head + "hook_state"][0, stretch]
    gap = torch.linalg.matrix_norm(states[stretch] - native_states) / torch.linalg.matrix_norm(native_states)
    np.testing.assert_allclose(one["state_gap"], gap, rtol=1e-8)
    cosine = torch.cosine_similarity(native[last][0, stretch], edited[last][0, stretch], dim=-1)
    np.testing.assert_allclose(one["residual_cosine"], cosine, rtol=1e-9)
    assert (one["residual_cosine"] < 1 - 1e-12).any()


def test_a_no_op_changes_nothing_and_every_condition_is_followed(result: Result) -> None:
    steps = result.tables["steps"]
    noop = steps[steps["condition"] == "native"]
    assert noop["state_gap"].max() < 1e-12 and noop["residual_cosine"].min() > 1 - 1e-12
    assert steps["step"].max() == 4 and set(steps["condition"]) == {"native", "delete", "atom", "mean"}
    assert (steps.groupby(["firing", "condition", "scale"]).size() == 5).all()
    assert steps.loc[steps["condition"] == "delete", "state_gap"].gt(0).all()
    assert result.info["n_edited_runs"] == len(steps) / 5
    assert result.claims()[0].outcome == "inconclusive"  # 6 firings


@pytest.mark.parametrize(
    "number, measured, outcome",
    [
        (None, {"atom": 0.2, "delete": 1.0, "mean": 0.5, "state_after": 0.1}, "holds"),
        (None, {"atom": 0.2, "delete": 1.0, "mean": 0.1, "state_after": 0.1}, "confounded"),
        (None, {"atom": 1.5, "delete": 1.0, "mean": 0.5, "state_after": 0.1}, "fails"),
        (None, {"atom": 1e-9, "delete": 1e-9, "mean": 1e-9, "state_after": 1e-9}, "below the floor"),
        (21, {"atom": 0.02, "delete": 0.3}, "holds"),
        (21, {"atom": 0.02, "delete": 0.03}, "confounded"),  # any write is small here, so that atoms show nothing
        (21, {"atom": 0.3, "delete": 0.2}, "fails"),
        (21, {"atom": 0.02, "delete": 1e-9}, "below the floor"),
    ],
)
def test_verdicts_of_known_tables(number: int | None, measured: dict[str, float], outcome: str) -> None:
    """Both claims of tables whose distance and state gap have these sizes."""
    rng = np.random.default_rng(0)
    rows = []
    for n, (condition, size) in itertools.product(range(24), ({"native": 1e-8} | measured).items()):
        unit = {"firing": n, "sequence": n // 3, "condition": condition, "state_gap": size * rng.uniform(0.9, 1.1)}
        rows += [unit | {"step": step, "residual_cosine": 1 - size} for step in (0, 1)]
    evaluation = Multistep(**SMALL | {"controls": tuple(name for name in measured if name not in ("atom", "delete"))})
    result = Result(evaluation, {"label": "x"}, {"steps": pd.DataFrame(rows)})
    claim = {claim.number: claim for claim in result.claims()}[number]
    assert (claim.outcome, claim.n) == (outcome, 24)


def test_the_horizon_holds_all_steps() -> None:
    assert Multistep(n_steps=30).substitution.horizon == 30
