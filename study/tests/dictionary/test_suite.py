"""Which dictionaries a comparison takes, and that evaluations of many dictionaries are saved one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from saes import HOOK, STATE, make_sae
from torch import Tensor

from hookpoints import HookedRecurrent
from hookpoints.errors import DamageWarning
from writesae_study.dictionary.controls import answers, control_dictionaries
from writesae_study.dictionary.suite import comparable, evaluate_all, groups
from writesae_study.evaluations import load_result
from writesae_study.evaluations.multistep import Multistep
from writesae_study.evaluations.seeds import Seeds
from writesae_study.evaluations.sign import Sign
from writesae_study.evaluations.substitution import Substitution
from writesae_study.experiment.evaluation import Evaluation, Result, Scope
from writesae_study.experiment.terms import Terms
from writesae_study.page.report import find_results

TEXT = torch.randint(1, 64, (8, 24), generator=torch.Generator().manual_seed(1))
TESTED, OTHER = TEXT[:4], TEXT[4:]
STEPS = Multistep(n_atoms=2, firings_per_atom=1, n_steps=2)


Suite = Callable[..., list[Result]]


@pytest.fixture
def suite(model: HookedRecurrent, tmp_path: Path) -> Suite:
    """Runs evaluations on dictionaries into the folder of the test, and says so on standard output."""

    def run(evaluations: list[Evaluation], saes: dict[str, SAE], terms: Tensor = OTHER, **how: Any) -> list[Result]:
        results, failures = evaluate_all(evaluations, model, saes, TESTED, tmp_path, terms=Terms(model, terms), **how)
        assert not failures
        return results

    return run


def test_a_comparison_takes_only_what_differs_in_nothing_else(model: HookedRecurrent) -> None:
    a, same, wide = make_sae(model), make_sae(model), make_sae(model, d_sae=40)
    states, flat = make_sae(model, hook=STATE), make_sae(model, "flat")
    scopes = (Scope.SEEDS, Scope.VARIANTS)

    def fitting(*saes: Any) -> list[Scope]:
        labelled = {str(n): sae for n, sae in enumerate(saes)}
        return [scope for scope in scopes if len(comparable(scope, labelled)) > 1]

    assert fitting(a, same) == [Scope.SEEDS] and fitting(a, states) == []
    assert fitting(a, flat) == fitting(a, wide) == [Scope.VARIANTS]
    assert fitting(states, flat) == fitting(a) == []
    everything = {"first": a, "state": states, "seed": same, "flat": flat, "wide": wide}
    everything["flat state"] = make_sae(model, "flat", hook=STATE)
    taken = [list(comparable(scope, everything)) for scope in scopes]
    assert taken == [["first", "seed"], ["first", "seed", "flat", "wide"]]


def test_dictionaries_are_grouped_by_head(model: HookedRecurrent) -> None:
    other = {name: hook.replace("heads.2", "heads.0") for name, hook in (("c", HOOK), ("d", STATE))}
    saes = {label: make_sae(model, hook=hook) for label, hook in ({"a": HOOK, "b": STATE} | other).items()}

    def labels(scope: Scope, single: bool = False) -> dict[str, list[str]]:
        return {cell: list(group) for cell, group in groups(scope, saes, single=single)}

    assert labels(Scope.VARIANTS) == labels(Scope.SEEDS) == {}
    assert labels(Scope.HEAD) == {"L1H2": ["a"], "L1H0": ["c"]}
    assert labels(Scope.EACH) == labels(Scope.LAYER) == {label: [label] for label in saes}  # two of one head
    assert [list(group) for _, group in groups(Scope.LAYER, {name: saes[name] for name in "bc"})] == [["b", "c"]]
    assert list(labels(Scope.VARIANTS, single=True).values()) == [list(saes)]


def test_results_are_saved_and_taken_again_where_nothing_changed(
    suite: Suite, model: HookedRecurrent, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saes = {"write": make_sae(model), "state": make_sae(model, hook=STATE)}
    assert not suite([Seeds()], saes)
    saes["state"] = make_sae(model)
    small = Seeds()
    assert [result.kind for result in suite([small], saes)] == ["seeds"]
    assert capsys.readouterr().out
    loaded = load_result(tmp_path / "seeds" / "L1H2")
    assert loaded.tables["counts"]["sae"].tolist() == ["write", "state"]
    suite([small], saes, resume=True)
    assert not capsys.readouterr().out
    with pytest.raises(ValueError, match="other settings"):
        suite([replace(small, seed=1)], saes, resume=True)
    suite([replace(small, seed=1)], saes, resume=True, replaced=True)
    assert capsys.readouterr().out
    (tmp_path / "seeds" / "L1H2" / "counts.parquet").write_bytes(b"")
    with pytest.warns(DamageWarning, match=r"counts.parquet.* it is L1H2.damaged now"):
        suite([replace(small, seed=1)], saes, resume=True)
    assert len(find_results([tmp_path])) == 1
    with pytest.raises(ValueError, match="two"):
        suite([small], {"write": saes["write"]}, single=True, replaced=True)


def test_controls_and_quality_go_with_every_dictionary(
    suite: Suite, model: HookedRecurrent, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen, saes = [STEPS, Sign(n_positions=4)], {"mine": make_sae(model)}
    results = suite(chosen, saes, controls=True)
    labels = ["mine", "mine, untrained", "mine, native writes", "L1H2"]  # a head has no control dictionary
    found = [(result.label, result.info.get("control")) for result in results]
    assert found == list(zip(labels, [None, "untrained", "native writes", None]))
    loaded = load_result(tmp_path / "multistep" / "mine-untrained")
    assert loaded.info["control_of"] == "mine" and list(loaded.info["quality"]) == ["mine, untrained"]  # type: ignore
    assert {row.label for row in answers(results)} == {"mine", "L1H2"}
    mine = results[0].info["quality"]["mine"]  # type: ignore[index, call-overload]
    assert mine == results[3].info["quality"]["mine"] and mine["n_tokens"] == 96  # type: ignore
    capsys.readouterr()
    again = suite(chosen, saes, controls=True, resume=True)
    assert [(r.label, r.info.get("control")) for r in again] == found and not capsys.readouterr().out


def test_baselines_are_fitted_on_the_text_of_the_controls(suite: Suite, model: HookedRecurrent) -> None:
    saes = {"mine": make_sae(model)}
    few: Any = {"n_atoms": 1, "firings_per_atom": 2, "horizon": 1, "scales": ("coefficient",), "controls": ("drawn",)}
    small = Substitution(**few, atom_choice=("own",))
    dictionaries = [saes, *control_dictionaries(model, saes, OTHER).values()]
    for result, own in zip(suite([small], saes, controls=True), dictionaries, strict=True):
        expected, without = (
            small.run(model, own, TESTED, reference=text, progress=False).tables["firings"] for text in (OTHER, None)
        )
        assert result.tables["firings"].equals(expected) and not expected.equals(without)
    with pytest.raises(ValueError, match="reference"):
        suite([small], saes, TEXT, single=True, replaced=True)
