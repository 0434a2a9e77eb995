"""Partition: cosines against dense matrices, planted mixtures, fixed verdicts, degenerate samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from made_up import replaced
from saes import HEAD, HOOK, LAYER, make_sae, planted

from sae_lens_writesae.atom.low_rank import LowRank
from writesae_study.dictionary.cosines import firing_cosines, first_component
from writesae_study.evaluations.partition import RULES, Partition
from writesae_study.experiment.bench import Bench
from writesae_study.experiment.evaluation import Result


@pytest.mark.parametrize("target", ["write", "state"])
def test_cosines_and_their_nulls_are_those_of_the_dense_matrices(model: Any, tokens: Any, target: str) -> None:
    """`shuffled` is of some write of the sequence; `untrained`, where the atom is the strongest, of the random atom
    with the largest product at the token."""
    sae = make_sae(model, hook=HOOK.replace("write", target))
    with torch.no_grad():
        lab = Bench(model, {"": sae}, tokens)
        numbers = lab.firings().alive(tokens.numel())
        table: Any = firing_cosines(lab, numbers)
        recurrence = model.recurrence(tokens[:1], LAYER)
        writes = recurrence.write(HEAD)[0, :, 0].flatten(1)
        read = writes if target == "write" else recurrence.states(HEAD)[0, :, 0].flatten(1)
    assert len(table) == len(lab.firings())
    first = table[table["sequence"] == 0].merge(lab.firings().frame(), on=["sequence", "position", "atom"])
    every = torch.cosine_similarity(writes[:, None], sae.W_dec[first["atom"].to_list()].detach(), dim=-1)  # [T,N]
    np.testing.assert_allclose(first["cosine"], every[first["position"].to_list(), range(len(first))], atol=1e-5)
    assert (every - torch.tensor(first["shuffled"])).abs().amin(0).max() < 1e-5
    seed = int(lab.rng(len(numbers), 1).integers(2**62))
    blank = LowRank(torch.empty(30, 1, 8), torch.empty(30, 1, 6))
    random = torch.nn.functional.normalize(blank.random_like(torch.Generator().manual_seed(seed)).dense().flatten(1))
    strongest = first.loc[first.groupby("position")["activation"].idxmax()]
    at = strongest["position"].to_list()
    best = random[(read[at] @ random.T).argmax(1)]
    np.testing.assert_allclose(strongest["untrained"], torch.cosine_similarity(best, writes[at]), atol=1e-5)


def test_the_first_component_is_that_of_the_dense_writes(model: Any, tokens: Any) -> None:
    with torch.no_grad():
        lab = Bench(model, {"": planted(model, tokens)}, tokens)
        component = first_component(lab).dense()[0].flatten()
        rows = model.recurrence(tokens, LAYER).write(HEAD)[:, :, 0].flatten(0, 1).flatten(1)
        top = torch.linalg.svd(rows - rows.mean(0)).Vh[0]
    assert component.norm().item() == pytest.approx(1, abs=1e-4)
    assert (component @ top).abs().item() == pytest.approx(1, abs=1e-3) and component @ rows.mean(0) > 0


# -- verdicts


def made(cosine: Any, shuffled: Any, untrained: Any = 0.0, components: int = 3, pca: float = -0.05) -> Result:
    """A result from chosen medians, with real fits."""
    evaluation = Partition(restarts=1, components=components)
    n = len(cosine)
    atoms = pd.DataFrame({"atom": range(n), "firings": 9, "cosine": np.asarray(cosine, float), "shuffled": shuffled})
    atoms["random"] = np.random.default_rng(9).normal(0, 0.01, n)
    atoms["untrained"] = np.random.default_rng(8).normal(untrained, 0.01, n)
    atoms["kind"] = np.where(atoms["cosine"] >= evaluation.threshold, "register", "bundle")
    atoms = atoms.assign(pca=pca)
    tables = {
        "atoms": atoms,
        "mixtures": evaluation.mixture_table(atoms),
        "substitution": pd.DataFrame(columns=list(Partition.columns["substitution"])),
    }
    info: Any = {"dead": 7, "label": "made"}
    return Result(evaluation, info, tables)


def normal(mean: float, sd: float, n: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(mean, sd, n)


def same(low: float, high: float, n_atoms: int = 20) -> Result:
    """Two kinds that both beat deletion, and the interval of their difference."""
    rates = [(kind, 0.9, 0.8, 1.0, 100, n_atoms) for kind in ("register", "bundle")]
    table = pd.DataFrame(rates, columns=list(Partition.columns["substitution"]))
    difference: Any = {"low": low, "high": high, "p_value": 0.5}
    compared: Any = {"difference": difference, "verdict": {"outcome": "holds", "sentence": ""}}
    result = made([0.3], [0.1])
    return replaced(result, {"compared": compared}, substitution=table)


@pytest.mark.parametrize(
    "cosines, shuffled, outcome",
    [
        ((0.4, 0.2, 0.1), (0.0, 0.0, 0.0), "holds"),
        ((0.1, 0.2, 0.4), (0.0, 0.0, 0.0), "fails"),  # another order
        ((0.4, 0.4, 0.1), (0.0, 0.0, 0.0), "fails"),  # two that do not differ
        ((0.4, 0.2, 0.1), (0.3, 0.1, 0.0), "confounded"),
    ],
)
def test_rules_are_compared_over_results(cosines: Any, shuffled: Any, outcome: str) -> None:
    results = []
    for n, (rule, cosine, null) in enumerate(zip(RULES, cosines, shuffled)):
        result = made(normal(cosine, 0.03, 80, n), normal(null, 0.03, 80, n + 9))
        results.append(replaced(result, {"rule": rule, "target": "write"}))
    ((label, claim),) = Partition.across(results)
    assert (claim.number, claim.outcome, claim.n) == (27, outcome, 240) and label == ", ".join(RULES)
    assert Partition.across(results[:1]) == [] == Partition.across([])
