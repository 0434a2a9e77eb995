"""Seeds: identical dictionaries up to order and sign, untrained ones, and verdicts of known samples."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from made_up import replaced
from saes import planted
from torch import Tensor

from hookpoints import HookedRecurrent
from writesae_study.evaluations.seeds import SAMPLES, Seeds
from writesae_study.experiment.evaluation import Result


def made(alive: list[int], *cosines: np.ndarray) -> Result:
    """A result of two dictionaries whose matched atoms, random directions and native writes have known |cosines|."""
    counts = pd.DataFrame({"sae": ["a", "b"], "alive": alive, "register": alive})
    parts = [
        pd.DataFrame({"a": "a", "b": "b", "sample": name, "first": range(len(x)), "second": 0, "cosine": x})
        for name, x in zip(SAMPLES, cosines, strict=True)
    ]
    pairs, evaluation = pd.concat(parts, ignore_index=True), Seeds()
    tables = {"counts": counts, "matches": evaluation.summary(pairs), "pairs": pairs}
    return Result(evaluation, {"label": "made"}, tables)


LOW, HIGH = np.linspace(0.1, 0.3, 200), np.linspace(0.4, 0.7, 200)


def test_one_pair_without_excess_decides() -> None:
    """Three dictionaries, of which two share nothing beyond chance."""
    alike, strange = (made([100, 99], cosines, LOW, LOW) for cosines in (HIGH, LOW))
    pairs = pd.concat([alike.tables["pairs"], strange.tables["pairs"].assign(b="c")], ignore_index=True)
    (claim,) = replaced(alike, matches=Seeds().summary(pairs)).claims()
    assert claim.outcome == "inconclusive" and "a and c" in claim.sentence


def test_the_same_atoms_in_another_order_are_found(model: HookedRecurrent, tokens: Tensor) -> None:
    sae, other = planted(model, tokens), planted(model, tokens)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    for name, parameter in other.named_parameters():
        parameter.data = parameter.data if name == "b_dec" else parameter.data[order]
    result = Seeds(min_firings=1).run(model, {"a": sae, "b": other}, tokens, progress=False)
    pairs = result.tables["pairs"].query("sample == 'atoms'")
    assert (order.numpy()[pairs["second"]] == pairs["first"]).all() and pairs["cosine"].min() > 1 - 1e-5
    assert result.tables["pairs"].query("sample != 'atoms'")["cosine"].median() < 0.9
