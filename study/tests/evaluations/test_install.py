"""Installed tokens: against passes by hand, nothing changed where nothing is added, and tables of known answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from saes import HEAD, LAYER, native_and_edited, native_writes, random_sae
from torch import Tensor

from hookpoints import HookedRecurrent
from sae_lens_writesae.steering import value_direction
from writesae_study.evaluations.install import Install
from writesae_study.experiment.evaluation import Result

SMALL: dict[str, Any] = {"pairs": 3, "prompt_tokens": 7, "sizes": (3.0,), "new_tokens": 3}


def test_installed_writes_are_those_of_the_definition(model64: HookedRecurrent, prompt_text: Tensor) -> None:
    result = Install(**SMALL, n_positions=2).run(model64, random_sae(model64), prompt_text, progress=False)
    table = result.tables["continuations"]
    assert set(table["stratum"]) == {"frequent"}  # of a vocabulary of 64
    assert result.info["n_skipped"] == {"pairs whose stratum is not in the vocabulary": 6}
    assert len(table) == result.info["n_edited_runs"] == 3 * 3  # nothing, target, random
    assert table.groupby("pair")["sequence"].nunique().eq(1).all()
    assert (table["hit"] == (table["first"] >= 0)).all() and table["rank"].between(2, 10).all()
    row = table[table["condition"] == "target"].iloc[0]
    rng = np.random.default_rng([0, 2])
    starts = rng.permutation(prompt_text.shape[1] // 7) * 7
    assert int(row["sequence"]) == rng.permutation(len(prompt_text))[0]
    prompt = prompt_text[[row["sequence"]], starts[0] : starts[0] + 7]
    keys, values = native_writes(model64, prompt)
    w = value_direction(model64, LAYER, HEAD, int(row["token"]))

    def change(writes: Tensor) -> Tensor:
        for t in (5, 6):
            writes[t] += 3 * values[t].norm() * torch.outer(keys[t], w)
        return writes

    native, edited = (x[-1].log_softmax(-1) for x in native_and_edited(model64, prompt, change))
    assert row["log_prob_change"] == pytest.approx(float((edited - native)[row["token"]]), rel=1e-5)
    assert row["edited_rank"] == 1 + int((edited > edited[int(row["token"])]).sum())
    nothing = table[table["condition"] == "nothing"]
    assert (nothing["edited_rank"] == nothing["rank"]).all()


def shares(target: float, random: float, wrong: float, nothing: float = 0.0, pairs: int = 40) -> Result:
    """Tables with given shares of hits, which are nested: pairs that are easy are easy under every condition."""
    rows = [
        {"pair": pair, "sequence": pair // 2, "stratum": "100-1000", "token": 1, "text": "a", "rank": 200}
        | {"hit": place < share, "wrong_hit": place < wrong, "first": 0 if place < share else -1}
        | {"wrong": 2, "condition": condition, "m": m, "log_prob_change": 0.1}
        | {"edited_rank": 100 if place < share else 300}
        for pair in range(pairs)
        for place in [pair * 7 % pairs / pairs]
        for condition, m, share in (("nothing", 0.0, nothing), ("target", 3.0, target), ("random", 3.0, random))
    ]
    return Result(Install(sizes=(3.0,)), {"label": "x"}, {"continuations": pd.DataFrame(rows)})
