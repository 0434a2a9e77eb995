"""Which dictionaries one run of an evaluation takes, and many evaluations in one go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_saes import HOOK, STATE, exact_sae, make_sae

from hookpoints import HookedRecurrent
from sae_lens_writesae.errors import NothingToMeasureError
from sae_lens_writesae.evaluations import load_result
from sae_lens_writesae.evaluations.multistep import Multistep
from sae_lens_writesae.evaluations.sign import Sign
from sae_lens_writesae.evaluations.substitution import Substitution
from sae_lens_writesae.experiment.evaluation import Scope
from sae_lens_writesae.experiment.suite import comparable, evaluate_all, groups, with_label

TOKENS = torch.randint(1, 64, (6, 24), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def saes(model: HookedRecurrent) -> dict:
    """Two seeds of writes, one of states, one flat, and one of another head."""
    other = HOOK.replace("heads.2", "heads.0")
    return {
        "w0": make_sae(model),
        "w1": make_sae(model),
        "s0": make_sae(model, hook=STATE),
        "flat": exact_sae(model_name=model.cfg.model_name),
        "other": make_sae(model, hook=other),
    }


def test_only_what_differs_in_one_thing_is_compared(saes: dict) -> None:
    def can(scope: Scope, *labels: str) -> bool:
        return comparable(scope, [saes[label] for label in labels])

    assert can(Scope.SEEDS, "w0", "w1") and not can(Scope.SEEDS, "w0", "s0") and not can(Scope.SEEDS, "w0", "flat")
    assert can(Scope.TARGETS, "w0", "s0") and not can(Scope.TARGETS, "w0", "w1")
    assert can(Scope.VARIANTS, "w0", "flat") and not can(Scope.VARIANTS, "w0", "w1")
    assert not can(Scope.VARIANTS, "w0", "flat", "s0") and not can(Scope.TARGETS, "w0", "s0", "flat")
    assert not any(can(scope, "w0") for scope in (Scope.SEEDS, Scope.TARGETS, Scope.VARIANTS))


def test_groups_by_scope(saes: dict) -> None:
    def labels(scope: Scope, *names: str, single: bool = False) -> list[tuple[str, list[str]]]:
        return [(label, list(g)) for label, g in groups(scope, {n: saes[n] for n in names}, single=single)]

    assert labels(Scope.EACH, "w0", "other") == [("w0", ["w0"]), ("other", ["other"])]
    assert labels(Scope.HEAD, "w0", "w1", "other") == [("L1H2", ["w0"]), ("L1H0", ["other"])]
    assert labels(Scope.SEEDS, "w0", "w1", "other") == [("L1H2", ["w0", "w1"])]
    assert labels(Scope.VARIANTS, "w0", "w1") == []  # passed over ...
    assert labels(Scope.VARIANTS, "w0", "w1", single=True) == [("", ["w0", "w1"])]  # ... unless asked for by name


def test_a_label_is_given_only_where_there_is_none() -> None:
    assert with_label(Sign(), "a").label == "a" and with_label(Sign(label="mine"), "a").label == "mine"


def test_many_evaluations_go_on_after_one_that_has_nothing_to_measure(
    model: HookedRecurrent, saes: dict, tmp_path: Path
) -> None:
    dead = saes["w0"]
    with torch.no_grad():
        dead.b_enc.fill_(-1e6)
    said: list[str] = []
    chosen = [Multistep(n_atoms=2, firings_per_atom=1, n_steps=2), Sign(n_positions=4)]
    results = evaluate_all(chosen, model, {"a/b c": dead}, TOKENS, tmp_path, progress=False, say=said.append)
    assert [r.kind for r in results] == ["multistep", "sign"] and results[1].skipped is None
    assert results[0].skipped is not None and results[0].skipped in said[0]
    assert load_result(tmp_path / "multistep" / "a-b-c").skipped == results[0].skipped  # a label is no path
    assert load_result(tmp_path / "sign" / "L1H2").label == "L1H2"  # named after the head alone
    with pytest.raises(NothingToMeasureError):  # asked for by itself, it is an error
        evaluate_all([Substitution()], model, {"a": dead}, TOKENS, tmp_path, progress=False)
