"""Which dictionaries a comparison takes, and that evaluations of many dictionaries are saved one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_saes import HOOK, STATE, make_sae

from hookpoints import HookedRecurrent
from sae_lens_writesae.errors import NothingToMeasureError
from writesae.evaluations import load_result
from writesae.evaluations.multistep import Multistep
from writesae.evaluations.objectives import Objectives
from writesae.evaluations.seeds import Seeds
from writesae.evaluations.sign import Sign
from writesae.evaluations.substitution import Substitution
from writesae.experiment.controls import answers, control_dictionaries
from writesae.experiment.evaluation import Scope
from writesae.experiment.suite import comparable, evaluate_all, groups, with_label

OTHER_HEAD = "heads.0"


def test_a_comparison_takes_only_what_differs_in_nothing_else(model: HookedRecurrent) -> None:
    a, same, wide = make_sae(model), make_sae(model), make_sae(model, d_sae=40)
    states, flat = make_sae(model, hook=STATE), make_sae(model, "flat")
    flat_states = make_sae(model, "flat", hook=STATE)

    def fitting(*saes: object) -> list[str]:
        scopes = (Scope.SEEDS, Scope.TARGETS, Scope.VARIANTS)
        labelled = {str(n): sae for n, sae in enumerate(saes)}
        return [scope.name for scope in scopes if len(comparable(scope, labelled)) > 1]  # type: ignore[arg-type]

    assert fitting(a, same) == ["SEEDS"]
    assert fitting(a, states) == ["TARGETS"]
    assert fitting(a, flat) == fitting(a, wide) == ["VARIANTS"]
    assert fitting(states, flat) == fitting(a) == []
    everything = {"first": a, "state": states, "seed": same, "flat": flat, "wide": wide, "flat state": flat_states}
    taken = {scope: list(comparable(scope, everything)) for scope in (Scope.SEEDS, Scope.TARGETS, Scope.VARIANTS)}
    assert taken == {
        Scope.SEEDS: ["first", "seed"],
        Scope.TARGETS: ["first", "state"],
        Scope.VARIANTS: ["first", "seed", "flat", "wide"],
    }


def test_dictionaries_are_grouped_by_head(model: HookedRecurrent) -> None:
    hooks = {"a": HOOK, "b": STATE, "c": HOOK, "d": STATE}
    saes = {
        label: make_sae(model, hook=hook if label in "ab" else hook.replace("heads.2", OTHER_HEAD))
        for label, hook in hooks.items()
    }

    def labels(scope: Scope, single: bool = False) -> dict[str, list[str]]:
        return {cell: list(group) for cell, group in groups(scope, saes, single=single)}

    assert labels(Scope.TARGETS) == {"L1H2": ["a", "b"], "L1H0": ["c", "d"]}
    assert labels(Scope.SEEDS) == {}
    assert labels(Scope.HEAD) == {"L1H2": ["a"], "L1H0": ["c"]}
    assert labels(Scope.LAYER) == {label: [label] for label in saes}  # two of one head
    assert [list(group) for _, group in groups(Scope.LAYER, {name: saes[name] for name in "bc"})] == [["b", "c"]]
    assert labels(Scope.EACH) == {label: [label] for label in saes}
    assert list(labels(Scope.TARGETS, single=True).values()) == [list(saes)]


def test_comparisons_of_many_are_saved_and_read_back(model: HookedRecurrent, tmp_path: Path) -> None:
    tokens = torch.randint(1, 64, (4, 24), generator=torch.Generator().manual_seed(1))
    saes = {"write": make_sae(model), "state": make_sae(model, hook=STATE)}
    small = Objectives(
        reconstruction_sequences=2, n_atoms=3, firings_per_atom=1, min_firings=1, controls=("random",), horizon=2
    )
    said: list[str] = []
    results = evaluate_all(
        [Seeds(), small], model, saes, tokens, tmp_path, progress=False, say=lambda line: said.append(str(line))
    )
    assert [result.kind for result in results] == ["objectives"] and len(said) == 1
    loaded = load_result(tmp_path / "objectives" / "L1H2")
    assert loaded.tables["dictionaries"]["sae"].tolist() == ["write", "state"]
    with pytest.raises(ValueError, match="two"):
        evaluate_all([small], model, {"write": saes["write"]}, tokens, tmp_path, single=True, progress=False)

    def again(seed: int) -> list[str]:
        said.clear()
        evaluation = replace(small, seed=seed)
        evaluate_all([evaluation], model, saes, tokens, tmp_path, resume=True, progress=False, say=said.append)
        return said

    assert again(0) == [] and len(again(1)) == 1  # saved already; saved with other settings


def test_controls_and_quality_go_with_every_dictionary(model: HookedRecurrent, tmp_path: Path) -> None:
    tokens = torch.randint(1, 64, (8, 24), generator=torch.Generator().manual_seed(1))
    said: list[object] = []
    chosen = [Multistep(n_atoms=2, firings_per_atom=1, n_steps=2), Sign(n_positions=4)]
    results = evaluate_all(
        chosen, model, {"mine": make_sae(model)}, tokens[:4], tmp_path, controls=tokens[4:], progress=False, say=len
    )
    labels = ["mine", "mine, untrained", "mine, native writes", "L1H2"]  # a head has no control dictionary
    assert [result.label for result in results] == labels
    assert [result.info.get("control") for result in results] == [None, "untrained", "native writes", None]
    loaded = load_result(tmp_path / "multistep" / "mine-untrained")
    assert loaded.info["control_of"] == "mine" and list(loaded.info["quality"]) == ["mine, untrained"]  # type: ignore
    assert {row.label for row in answers(results)} == {"mine", "L1H2"}
    again = evaluate_all(
        chosen,
        model,
        {"mine": make_sae(model)},
        tokens[:4],
        tmp_path,
        controls=tokens[4:],
        resume=True,
        say=said.append,
    )
    assert [(r.label, r.info.get("control")) for r in again] == [(r.label, r.info.get("control")) for r in results]
    assert said == []  # all of them were saved
    mine = results[0].info["quality"]["mine"]  # type: ignore[index, call-overload]
    assert mine == results[3].info["quality"]["mine"] and mine["n_tokens"] == 96  # type: ignore


def test_comparisons_are_run_on_controls_of_all_they_compare(model: HookedRecurrent, tmp_path: Path) -> None:
    tokens = torch.randint(1, 64, (8, 24), generator=torch.Generator().manual_seed(1))
    saes = {"a": make_sae(model), "b": make_sae(model)}
    results = evaluate_all([Seeds()], model, saes, tokens[:4], tmp_path, controls=tokens[4:], progress=False, say=len)
    assert [r.label for r in results] == ["L1H2", "L1H2, untrained", "L1H2, native writes"]
    assert all(r.info["saes"] == ["a", "b"] for r in results)
    assert list(results[1].info["quality"]) == ["a, untrained", "b, untrained"]  # type: ignore[call-overload]


def test_baselines_are_fitted_on_the_text_of_the_controls(model: HookedRecurrent, tmp_path: Path) -> None:
    tokens = torch.randint(1, 64, (8, 24), generator=torch.Generator().manual_seed(1))
    tested, other = tokens[:4], tokens[4:]
    saes = {"mine": make_sae(model)}
    few = {"n_atoms": 1, "firings_per_atom": 2, "n_codes": 3, "pca_components": 1}
    small = Substitution(**few, horizon=1, scales=("coefficient",), controls=("drawn",), atom_choice=("own",))
    results = evaluate_all([small], model, saes, tested, tmp_path, controls=other, progress=False, say=len)
    dictionaries = [saes["mine"], *(own["mine"] for own in control_dictionaries(model, saes, other).values())]
    for result, sae in zip(results, dictionaries, strict=True):
        expected = small.run(model, sae, tested, reference=other, progress=False).tables["firings"]
        assert result.tables["firings"].equals(expected)
    without = small.run(model, saes, tested, progress=False).tables["firings"]
    assert not results[0].tables["firings"].equals(without)
    with pytest.raises(ValueError, match="reference"):
        evaluate_all([small], model, saes, tested, tmp_path, controls=tokens, progress=False, say=len)


def test_a_label_is_given_only_where_there_is_none() -> None:
    assert with_label(Sign(), "a").label == "a" and with_label(Sign(label="mine"), "a").label == "mine"


def test_many_evaluations_go_on_after_one_that_has_nothing_to_measure(model: HookedRecurrent, tmp_path: Path) -> None:
    dead = make_sae(model)
    tokens = torch.randint(1, 64, (6, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        dead.b_enc.fill_(-1e6)
    said: list[str] = []
    chosen = [Multistep(n_atoms=2, firings_per_atom=1, n_steps=2), Sign(n_positions=4)]
    results = evaluate_all(chosen, model, {"a/b c": dead}, tokens, tmp_path, progress=False, say=said.append)
    assert [r.kind for r in results] == ["multistep", "sign"] and results[1].skipped is None
    assert results[0].skipped is not None and results[0].skipped in said[0]
    assert load_result(tmp_path / "multistep" / "a-b-c").skipped == results[0].skipped  # a label is no path
    assert load_result(tmp_path / "sign" / "L1H2").label == "L1H2"  # named after the head alone
    with pytest.raises(NothingToMeasureError):  # asked for by itself, it is an error
        evaluate_all([Substitution()], model, {"a": dead}, tokens, tmp_path, single=True, progress=False)
