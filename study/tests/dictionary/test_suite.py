"""Which dictionaries a comparison takes, and that evaluations of many dictionaries are saved one by one."""

from __future__ import annotations

from collections.abc import Callable
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
    saes = {
        "first": make_sae(model),
        "state": make_sae(model, hook=STATE),
        "seed": make_sae(model),
        "flat": make_sae(model, "flat"),
        "wide": make_sae(model, d_sae=40),
        "flat state": make_sae(model, "flat", hook=STATE),
    }
    assert list(comparable(Scope.SEEDS, saes)) == ["first", "seed"]
    assert list(comparable(Scope.VARIANTS, saes)) == ["first", "seed", "flat", "wide"]
    assert list(comparable(Scope.VARIANTS, {name: saes[name] for name in ("first", "seed", "state")})) == ["first"]


def test_dictionaries_are_grouped_by_head(model: HookedRecurrent) -> None:
    hooks = {"a": HOOK, "b": STATE, "c": HOOK.replace("heads.2", "heads.0"), "d": STATE.replace("heads.2", "heads.0")}
    saes = {label: make_sae(model, hook=hook) for label, hook in hooks.items()}

    def labels(scope: Scope, among: str = "abcd", **how: bool) -> dict[str, list[str]]:
        return {cell: list(group) for cell, group in groups(scope, {name: saes[name] for name in among}, **how)}

    assert labels(Scope.VARIANTS) == labels(Scope.SEEDS) == {}
    assert labels(Scope.HEAD) == {"L1H2": ["a"], "L1H0": ["c"]}
    assert labels(Scope.EACH) == labels(Scope.LAYER) == {label: [label] for label in saes}  # two of one head
    assert labels(Scope.LAYER, "bc") == {"L1": ["b", "c"]}
    assert labels(Scope.VARIANTS, single=True) == {"L1H2": list(saes)}


def test_results_are_saved_and_taken_again_where_nothing_changed(
    suite: Suite, model: HookedRecurrent, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saes, asked, other = {"one": make_sae(model), "two": make_sae(model)}, [Seeds()], [Seeds(seed=1)]
    assert [result.kind for result in suite(asked, saes)] == ["seeds"] and capsys.readouterr().out
    folder = tmp_path / "seeds" / "L1H2"
    assert load_result(folder).tables["counts"]["sae"].tolist() == [*saes]
    suite(asked, saes, resume=True)
    assert not capsys.readouterr().out
    with pytest.raises(ValueError, match="other settings"):
        suite(other, saes, resume=True)
    suite(other, saes, resume=True, replaced=True)
    assert capsys.readouterr().out
    (folder / "counts.parquet").write_bytes(b"")
    with pytest.warns(DamageWarning, match=r"counts.parquet.* it is L1H2.damaged now"):
        suite(other, saes, resume=True)
    assert len(find_results([tmp_path])) == 1
    with pytest.raises(ValueError, match="two"):
        suite(asked, {"one": saes["one"]}, single=True, replaced=True)


def test_controls_and_quality_go_with_every_dictionary(
    suite: Suite, model: HookedRecurrent, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen, saes = [STEPS, Sign(n_positions=4)], {"mine": make_sae(model)}
    results = suite(chosen, saes, controls=True)
    made = [(result.label, result.info.get("control")) for result in results]
    controls = [(f"mine, {control}", control) for control in ("untrained", "native writes")]
    assert made == [("mine", None), *controls, ("L1H2", None)]  # a head has no control dictionary
    loaded = load_result(tmp_path / "multistep" / "mine-untrained")
    assert loaded.info["control_of"] == "mine" and "mine, untrained" in loaded.info["quality"]  # type: ignore
    assert {row.label for row in answers(results)} == {"mine", "L1H2"}
    assert results[0].info["quality"] == results[3].info["quality"]
    capsys.readouterr()
    again = suite(chosen, saes, controls=True, resume=True)
    assert [(r.label, r.info.get("control")) for r in again] == made and not capsys.readouterr().out


def test_baselines_are_fitted_on_the_text_of_the_controls(suite: Suite, model: HookedRecurrent) -> None:
    saes = {"mine": make_sae(model)}
    few: Any = {"n_atoms": 1, "firings_per_atom": 2, "horizon": 1, "scales": ("coefficient",), "controls": ("drawn",)}
    small = Substitution(**few, atom_choice=("own",))
    dictionaries = [saes, *control_dictionaries(model, saes, OTHER).values()]
    for result, own in zip(suite([small], saes, controls=True), dictionaries, strict=True):
        alone = small.run(model, own, TESTED, reference=OTHER, progress=False)
        assert result.tables["firings"].equals(alone.tables["firings"])
    with pytest.raises(ValueError, match="reference"):
        suite([small], saes, TEXT, single=True, replaced=True)
