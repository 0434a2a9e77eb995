"""Passages without a class of atoms, against full passes with the write changed by hand; verdicts of known costs."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from saes import logits_with_write, one_atom_a_position, random_sae
from torch import Tensor

from hookpoints import HookedRecurrent
from sae_lens_writesae.errors import NothingToMeasureError
from writesae.evaluations.passage import CONTROLS, Passage
from writesae.experiment.evaluation import Result

T = 18


@pytest.fixture(scope="module")
def varied() -> Tensor:
    return torch.randint(1, 64, (8, 21), generator=torch.Generator().manual_seed(9))


def test_a_passage_without_its_only_class_is_one_whose_head_writes_nothing(model64: HookedRecurrent) -> None:
    tokens = torch.randint(1, 64, (1, T), generator=torch.Generator().manual_seed(5)).repeat(6, 1)
    planted = one_atom_a_position(model64, tokens[:1])
    result = Passage(passages=2, min_firings=1).run(model64, planted, tokens, progress=False)

    def bits(logits: Tensor) -> float:
        return float(torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:])) / math.log(2)

    native = bits(logits_with_write(model64, tokens[:1], lambda writes: writes))
    gone = bits(logits_with_write(model64, tokens[:1], torch.zeros_like))
    table = result.tables["passages"]
    for condition in ("deleted", "own"):  # own: the same norm of the same writes, which is all of them
        np.testing.assert_allclose(table[table["condition"] == condition]["bits"], gone - native, rtol=1e-5)
    np.testing.assert_allclose(table[table["condition"] == "native"]["bits"], 0, atol=1e-9)  # a no-op
    np.testing.assert_allclose(table["native_bits"], native, rtol=1e-9)
    assert (table["tokens_edited"] == T).all() and np.allclose(table["norm"], 1) and abs(gone - native) > 1e-4
    assert len(set(table["bits"].round(9))) > 3  # the controls do something else


def test_two_kinds_of_atom_are_told_apart_by_the_rule(model: HookedRecurrent, varied: Tensor) -> None:
    sae = random_sae(model)
    for threshold, name in ((-2.0, "register"), (2.0, "bundle")):
        result = Passage(passages=3, min_firings=1, threshold=threshold).run(model, sae, varied, progress=False)
        assert set(result.tables["classes"]["class"]) == set(result.tables["passages"]["class"]) == {name}


def test_what_cannot_be_measured_is_refused(model: HookedRecurrent, varied: Tensor) -> None:
    sae = random_sae(model)
    silent = random_sae(model, bias=-1e6)
    for dictionary, text, changes, words in (
        (sae, varied[:3], {}, "4 sequences"),
        (sae, varied, {"min_firings": 300}, "300 times"),
        (silent, varied, {}, "fires"),
    ):
        with pytest.raises(NothingToMeasureError, match=words):
            Passage(**changes).run(model, dictionary, text, progress=False)


NOISE = 0.02 * np.random.default_rng(3).standard_normal(20)


def sampled(n: int = 20, **costs: float) -> Result:
    all_costs = {name: 0.0 for name in ("deleted", *CONTROLS)} | costs
    rows = [
        {"sequence": i, "class": "register", "condition": name, "bits": bits * (1 + NOISE[i])}
        | {"native_bits": 2.0, "tokens_edited": 9, "norm": 0.5}
        for name, bits in (all_costs | {"native": 1e-6}).items()
        for i in range(n)
    ]
    members = pd.DataFrame({"class": ["register"] * 2, "atom": [3, 4]})
    return Result(Passage(), {"label": "x"}, {"passages": pd.DataFrame(rows), "classes": members})


@pytest.mark.parametrize(
    "costs, outcome",
    [
        ({"deleted": 0.01, "random": 0.2, "removed": 0.05}, "holds"),
        ({"deleted": 0.01, "random": 0.2, "removed": 0.01}, "confounded"),
        ({"deleted": 0.3, "random": 0.2, "removed": 0.01}, "fails"),
        ({"deleted": 1e-8}, "below the floor"),
    ],
)
def test_verdicts(costs: dict[str, float], outcome: str) -> None:
    claim = sampled(**costs).claims()[0]
    assert (claim.number, claim.outcome, claim.n) == (19, outcome, 20) and "2 atoms" in claim.measured
