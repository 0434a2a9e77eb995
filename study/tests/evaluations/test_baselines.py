"""Baselines: a dictionary that is right beside one that is not, what cannot be compared, fixed verdicts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sae_lens import SAE
from saes import STATE, make_sae, random_sae
from torch import Tensor

from hookpoints import HookedRecurrent
from writesae_study.evaluations.baselines import Baselines
from writesae_study.experiment.evaluation import Result


def test_dictionaries_of_two_hooks_are_not_compared(model: HookedRecurrent, varied: Tensor) -> None:
    saes = {"a": make_sae(model), "s": make_sae(model, hook=STATE)}
    with pytest.raises(ValueError, match="one hook"):
        Baselines().run(model, saes, varied, progress=False)


def test_atoms_that_are_the_writes_cost_nothing(model64: HookedRecurrent, planted: SAE, equal_rows: Tensor) -> None:
    few = Baselines(horizon=3, pca_ranks=(1,), pca_writes=20)
    tables = few.run(model64, {"right": planted, "random": random_sae(model64)}, equal_rows, progress=False).tables
    for table, measure in (("writes", "kl"), ("replacement", "nats")):
        largest = tables[table].assign(cost=tables[table][measure].abs()).groupby("sae")["cost"].max()
        assert largest["right"] < 1e-8 < 1e-5 < largest["random"], table


# -- verdicts


SAES = {"ours": "WriteSAE", "two": "WriteSAE-rank2", "flat": "FlatSAE", "small": "FlatSAE", "dense": "MatrixSAE"}


def made_up(
    kl: dict[tuple[str, str], float] | None = None,
    nats: dict[tuple[str, str], float] | None = None,
    dead: dict[str, int] | None = None,
    drop: tuple[str, ...] = (),
    n_sequences: int = 20,
    selectivity: float = 0.98,
    small: int = 1000,
    seed: int = 0,
) -> Result:
    """KLs by (sae, condition), costs by (sae, method), dead atoms and selectivity by dictionary, with noise."""
    rng, n = np.random.default_rng(seed), 2 * n_sequences
    dictionaries = pd.DataFrame({"variant": SAES, "d_sae": 400, "parameters": 9000, "dead": 5})
    dictionaries.loc["small", "d_sae"] = 20
    dictionaries.loc[["ours", "small"], "parameters"] = 1000, small
    dictionaries.loc[[*(dead or {})], "dead"] = [*(dead or {}).values()]
    base = {("", "native"): 1e-13, ("", "delete"): 1.0, ("ours", "atom"): 0.2, ("ours", "svd"): 0.2}
    base |= dict.fromkeys([("flat", "svd"), ("flat", "atom svd"), ("small", "svd")], 3.0)
    base |= {("", name): 3.0 for name in ("random", "mean", "state", "pca 1", "pca 4")} | {("", "state_after"): 0.01}
    costs = {("", "itself"): 0.0, ("ours", "dictionary"): 0.01, ("two", "dictionary"): 0.01}
    costs |= {("", "mean"): 0.1, ("", "zero"): 0.2} | (nats or {})
    places = pd.DataFrame({"sequence": np.arange(n) // 2, "position": np.arange(n) % 2})

    def measured(means: dict[tuple[str, str], float], what: str, value: str, spread: float) -> pd.DataFrame:
        parts = []
        for (sae, name), mean in means.items():
            drawn = {value: mean * np.exp(spread * rng.normal(size=n))}
            parts.append(places.assign(**{"sae": sae, what: name}, **drawn))
        return pd.concat(parts, ignore_index=True)

    tables = {
        "dictionaries": dictionaries.drop(index=[*drop]).rename_axis("sae").reset_index(),
        "writes": measured(base | (kl or {}), "condition", "kl", 0.5),
        "replacement": measured(costs, "method", "nats", 0.03),
        "selectivity": places.assign(sae="ours", selectivity=selectivity + 0.001 * rng.normal(size=n), chance=0.98),
    }
    info = {"target": "write", "label": "made up", "n_positions": 64, "d_vocab": 4096}
    return Result(Baselines(pca_ranks=(1, 4)), info, tables)  # pyright: ignore[reportArgumentType]
