"""Results are safe as the product's folders are: damaged, or killed while they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reliability.checks import Check
from reliability.folders import Contents, damaged
from reliability.test_reliability import assert_holds, case, pytestmark
from reliability.writing import kills
from results_on_disk import RESULT, read_result
from saes import planted

from hookpoints import HookedRecurrent
from writesae.files import taken
from writesae_study.dictionary.suite import _result_folder, evaluate_all
from writesae_study.evaluations import EVALUATIONS

__all__ = ["pytestmark"]


def results(model: HookedRecurrent, folder: Path) -> None:
    """Two evaluations of a dictionary, resuming what is there."""
    rows = torch.randint(1, 64, (12, 40), generator=torch.Generator().manual_seed(3))
    small: dict[str, dict[str, Any]] = {"multistep": {"n_atoms": 4, "firings_per_atom": 2, "n_steps": 3}}
    small["install"] = {"pairs": 3, "prompt_tokens": 7, "n_positions": 3, "new_tokens": 3}
    some = [EVALUATIONS[kind](**settings) for kind, settings in small.items()]
    with taken(folder, say=lambda _: None):
        saes = {"a": planted(model, rows)}
        evaluate_all(some, model, saes, rows, folder, resume=True, progress=False, say=lambda _: None)


def contents(folder: Path) -> Contents:
    """The results that are there under their own names."""
    places = [file.parent for file in sorted(folder.rglob("info.json"))]
    names = {place: str(place.relative_to(folder)) for place in places}
    return {name: read_result(place) for place, name in names.items() if not name.startswith(".") and "/." not in name}


CHECKS = [
    Check("Kills", kills(results, contents), few=2, many=60, slow=True),
    Check("Damaged folders", damaged("result", RESULT), few=60, many=220, slow=False),
]


@pytest.mark.parametrize("check", [case(check) for check in CHECKS])
def test_results_hold(tmp_path: Path, check: Check) -> None:
    assert_holds(tmp_path, check)


def test_a_label_is_no_path(tmp_path: Path) -> None:
    assert _result_folder(tmp_path, "substitution", "../../a").parent == tmp_path / "substitution"
    for label in (".", ".."):
        with pytest.raises(ValueError, match="label"):
            _result_folder(tmp_path, "substitution", label)
