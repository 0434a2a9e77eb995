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


def test_installed_writes_are_those_of_the_definition(model64: HookedRecurrent, prompt_text: Tensor) -> None:
    small: dict[str, Any] = {"pairs": 3, "prompt_tokens": 7, "sizes": (3.0,), "new_tokens": 3, "n_positions": 2}
    result = Install(**small).run(model64, random_sae(model64), prompt_text, progress=False)
    table = result.tables["continuations"]
    assert {*table["stratum"]} == {"frequent"} and table["rank"].between(2, 10).all()  # of a vocabulary of 64
    assert len(table) == result.info["n_edited_runs"] == 3 * 3  # pairs; nothing, target, random
    assert (table["hit"] == (table["first"] >= 0)).all()
    row = table[table["condition"] == "target"].iloc[0]
    rng = np.random.default_rng([0, 2])
    start = 7 * rng.permutation(prompt_text.shape[1] // 7)[0]
    assert row["sequence"] == rng.permutation(len(prompt_text))[0]
    prompt = prompt_text[[row["sequence"]], start : start + 7]
    keys, values = native_writes(model64, prompt)
    w = value_direction(model64, LAYER, HEAD, int(row["token"]))

    def change(writes: Tensor) -> Tensor:
        for t in (5, 6):
            writes[t] += 3 * values[t].norm() * torch.outer(keys[t], w)
        return writes

    native, edited = (x[-1].log_softmax(-1) for x in native_and_edited(model64, prompt, change))
    assert row["log_prob_change"] == pytest.approx(float((edited - native)[row["token"]]), rel=1e-5)
    assert row["edited_rank"] == 1 + int((edited > edited[row["token"]]).sum())


def shares(target: float, random: float, wrong: float) -> Result:
    """Tables with given shares of hits, which are nested: pairs that are easy are easy under every condition."""
    pairs = pd.DataFrame({"pair": range(40), "place": np.arange(40) * 7 % 40 / 40, "stratum": "100-1000", "token": 1})
    pairs = pairs.assign(sequence=pairs["pair"] // 2, rank=200, log_prob_change=0.1, wrong_hit=pairs["place"] < wrong)
    parts = []
    for condition, m, share in (("nothing", 0.0, 0.0), ("target", 3.0, target), ("random", 3.0, random)):
        hit = pairs["place"] < share
        parts.append(pairs.assign(condition=condition, m=m, hit=hit, edited_rank=np.where(hit, 100, 300)))
    return Result(Install(sizes=(3.0,)), {"label": "x"}, {"continuations": pd.concat(parts, ignore_index=True)})
