"""Passages without a class of atoms: against passes by hand, what cannot be measured, and verdicts of known costs."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from saes import native_and_edited, random_sae
from torch import Tensor
from torch.nn.functional import cross_entropy

from hookpoints import HookedRecurrent
from writesae_study.evaluations.passage import CONTROL_NAMES, Passage
from writesae_study.experiment.evaluation import Result


@pytest.mark.parametrize(("threshold", "name"), [(-2.0, "register"), (2.0, "bundle")])
def test_a_deleted_class_is_taken_from_every_write_where_it_fires(
    model64: HookedRecurrent, varied: Tensor, threshold: float, name: str
) -> None:
    sae = random_sae(model64)
    result = Passage(passages=3, min_firings=1, threshold=threshold).run(model64, sae, varied, progress=False)
    members, passages = result.tables["classes"], result.tables["passages"]
    assert set(members["class"]) == set(passages["class"]) == {name}
    row, own = passages.query("condition == 'deleted'").iloc[0], members["atom"].tolist()
    tokens = varied[[row["sequence"]]]

    def without(writes: Tensor) -> Tensor:
        return writes - (sae.encode(writes.flatten(1))[:, own] @ sae.W_dec[own]).view_as(writes)

    native, edited = (
        float(cross_entropy(logits[:-1], tokens[0, 1:])) / math.log(2)
        for logits in native_and_edited(model64, tokens, without)
    )
    assert row["bits"] == pytest.approx(edited - native, rel=1e-4)


NOISE = 0.02 * np.random.default_rng(3).standard_normal(20)


def sampled(**costs: float) -> Result:
    bits = {name: 0.0 for name in ("deleted", *CONTROL_NAMES)} | costs | {"native": 1e-6}
    parts = [pd.DataFrame({"condition": name, "bits": cost * (1 + NOISE)}) for name, cost in bits.items()]
    passages = pd.concat(parts).rename_axis("sequence").reset_index().assign(**{"class": "register"}, tokens_edited=9)
    members = pd.DataFrame({"class": ["register"] * 2, "atom": [3, 4]})
    return Result(Passage(), {"label": "x"}, {"passages": passages, "classes": members})


def test_the_claim_is_that_of_registers() -> None:
    result = sampled()
    passages = result.tables["passages"]
    result.tables["passages"] = pd.concat([passages.assign(**{"class": "bundle"}), passages])
    assert "register" in Passage().findings(result)[0].claim
