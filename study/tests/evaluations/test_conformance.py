"""What every evaluation promises, whatever it asks: found by its class, so that a new one is tested too.

The results are those of `measured.toml`.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import get_args

import pandas as pd
import pytest
from measured import load_model, make_dictionary, result_of, sequences
from saes import muted, random_sae
from torch import Tensor

from hookpoints import HookedRecurrent
from writesae_study.evaluations import EVALUATIONS, load_result
from writesae_study.experiment.draws import halves
from writesae_study.experiment.evaluation import Scope
from writesae_study.verdict.paper import Outcome

KINDS = sorted(EVALUATIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_settings_are_kept_as_json_and_checked(kind: str) -> None:
    made = EVALUATIONS[kind]
    settings = result_of(kind).evaluation.to_dict() | {"seed": 7, "label": "x"}
    assert made.from_dict(json.loads(json.dumps(settings))).to_dict() == settings
    for name, value in settings.items():
        with pytest.raises(ValueError, match=name):
            made.from_dict({name: -1 if type(value) is int else {1: 2}})


@pytest.mark.parametrize(
    ("kind", "settings", "word"),
    [
        ("amplify", {"factors": (1.0, 4.0)}, "factors"),
        ("amplify", {"headline": 3.0}, "headline"),
        ("erasure", {"min_firings": 20}, "min_firings"),
        ("install", {"headline": 2.0}, "headline"),
        ("install", {"n_positions": 8, "prompt_tokens": 7}, "n_positions"),
        ("install", {"semantic": (5,)}, "semantic"),
        ("logit_change", {"eps": (0.1,)}, "eps"),
        ("logit_change", {"horizons": (1, 1)}, "horizons"),
        ("logit_change", {"ranks": ((3, 2),)}, "ranks"),
        ("sign", {"ranks": ((5, 2),)}, "ranks"),
        ("sign", {"n_positions": 1}, "n_positions"),
        ("substitution", {"scales": ("matched", "unit")}, "unit"),
        ("substitution", {"scales": ()}, "scales"),
        ("substitution", {"controls": ("random", "random")}, "once"),
    ],
)
def test_settings_that_make_no_sense(kind: str, settings: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        EVALUATIONS[kind](**settings)


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_is_what_the_class_documents_and_the_same_when_loaded(kind: str, tmp_path: Path) -> None:
    result = result_of(kind)
    for name, columns in EVALUATIONS[kind].columns.items():
        table = result.tables[name]
        assert list(table.columns) == list(columns) and len(table) and not table.isna().to_numpy().any(), name
    claims = result.claims()
    for claim in claims:
        assert claim.outcome in get_args(Outcome) and claim.sentence and "nan" not in claim.measured.lower()
        assert claim.number is None or claim.number in EVALUATIONS[kind].answers
    assert claims and len({claim.claim for claim in claims}) == len(claims)  # ids of its panels are made from it
    loaded = load_result(result.save(tmp_path / kind))
    assert (loaded.evaluation, loaded.info, loaded.claims()) == (result.evaluation, result.info, claims)
    for name, table in result.tables.items():
        pd.testing.assert_frame_equal(loaded.tables[name], table, check_dtype=False)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("logit_change", {"n_atoms": None, "firings_per_atom": 8, "horizons": (0,), "ranks": ((1, 1),)}),
        ("sign", {"n_positions": 12, "ranks": ((1, 10),), "sizes": (1.0,), "first_position": 3}),
    ],
)
def test_writes_of_zero_are_left_out_and_counted(
    model64: HookedRecurrent, varied: Tensor, kind: str, settings: dict[str, object]
) -> None:
    always = random_sae(model64, k=12, bias=5.0)  # fires on nothing, too
    with muted(model64, 10):
        result = EVALUATIONS[kind](**settings).run(model64, always, varied, progress=False)
    table = next(iter(result.tables.values()))
    assert table["position"].min() >= 10 and sum(result.info["n_skipped"].values()) > 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("kind", "settings", "chosen"),
    [
        (
            "amplify",
            {"n_tokens": 2, "min_count": 2, "min_firings": 2, "prompts": 3, "prompt_tokens": 5, "new_tokens": 6},
            ["token", "atom", "phi"],
        ),
        (
            "erasure",
            {"n_atoms": 3, "horizon": 2, "min_firings": 2, "injected": ()},
            ["atom", "token", "n_select", "selected"],
        ),
    ],
)
def test_what_is_chosen_never_sees_the_test_half(
    model64: HookedRecurrent, varied: Tensor, kind: str, settings: dict[str, object], chosen: list[str]
) -> None:
    sae, split, changed = random_sae(model64), halves(len(varied), 0), varied.clone()
    changed[split.test] = varied[split.test].flip(1)
    evaluation = EVALUATIONS[kind](**settings)
    one, other = (evaluation.run(model64, sae, ids, progress=False).tables for ids in (varied, changed))
    assert one["atoms"][chosen].equals(other["atoms"][chosen])
    assert not all(one[name].equals(other[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_poor_input_is_refused_or_gives_no_verdict(kind: str, tmp_path: Path) -> None:
    evaluation, scope, tokens = result_of(kind).evaluation, EVALUATIONS[kind].scope, sequences()[:8]
    dead = {"a": make_dictionary(), "b": make_dictionary()}
    for sae in dead.values():
        sae.b_enc.detach().fill_(-1e6)
    asked, other = (dead, {"a": dead["a"]}) if scope.compares else ({"a": dead["a"]}, dead)
    run = partial(evaluation.run, load_model(), progress=False)
    for saes, text, word in ((asked, tokens[:, :1], "tokens"), (other, tokens, "got")):
        with pytest.raises(ValueError, match=word):
            run(saes, text)
    if scope is Scope.HEAD:
        return
    result = run(asked, tokens, or_skip=True)
    loaded = load_result(result.save(tmp_path / kind))
    assert loaded.skipped == result.skipped
    if result.skipped is not None:
        assert {claim.outcome for claim in loaded.claims()} == {"not tested"}
    elif scope is not Scope.VARIANTS:
        assert "holds" not in {claim.outcome for claim in loaded.claims()}
