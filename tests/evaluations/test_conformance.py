"""What every evaluation promises, whatever it asks: found by its class, so that a new one is tested too."""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import get_args

import numpy as np
import pandas as pd
import pytest
import torch
from sealing import reseal
from small_saes import HOOK, exact_sae, make_sae, planted

from sae_lens_writesae.errors import NothingToMeasureError
from writesae.evaluations import EVALUATIONS, load_result
from writesae.experiment.evaluation import Evaluation, Result, Scope
from writesae.settings import settings_of
from writesae.verdict.paper import PAPER_CLAIMS, Outcome

SIZES = {
    "n_atoms": 6,
    "firings_per_atom": 2,
    "select_firings": 4,
    "test_firings": 4,
    "min_firings": 2,
    "horizon": 3,
    "horizons": (0, 1, 2),
    "n_steps": 3,
    "mean_write_sequences": 2,
    "n_positions": 12,
    "pairs": 4,
    "new_tokens": 3,
    "prompt_tokens": 12,
    "prompts": 6,
    "passages": 6,
    "min_count": 2,
    "tested_atoms": 3,
    "test_sequences": 4,
    "reconstruction_sequences": 4,
    "positions_per_sequence": 2,
    "replacement_sequences": 2,
    "pca_ranks": (1, 2),
    "state_ranks": (1, 2),
    "pca_writes": 40,
    "ranks": ((1, 1), (2, 5)),
}
"""Small values of settings, for those evaluations that have them."""

KINDS = sorted(EVALUATIONS)


def small(kind: str, **more: object) -> Evaluation:
    names = {field.name for field in dataclasses.fields(EVALUATIONS[kind])}
    settings: dict[str, object] = {}
    for name in [name for name in SIZES if name in names]:  # sizes mean different things: those that are accepted
        try:
            EVALUATIONS[kind](**settings, **{name: SIZES[name]})
        except ValueError:
            continue
        settings[name] = SIZES[name]
    return EVALUATIONS[kind](**settings | more)


@pytest.fixture(scope="module")
def world(hf):
    """A model, sequences, and dictionaries of every scope."""
    from hookpoints import HookedRecurrent

    model = HookedRecurrent.from_hf(hf)
    tokens = torch.randint(1, 64, (12, 40), generator=torch.Generator().manual_seed(3))
    one = planted(model, tokens)
    torch.manual_seed(1)
    other = planted(model, tokens[6:])
    state = make_sae(model, hook=HOOK.replace("write", "state"))
    saes = {
        Scope.EACH: {"": one},
        Scope.LAYER: {"": one},
        Scope.HEAD: {"": one},
        Scope.SEEDS: {"a": one, "b": other},
        Scope.TARGETS: {"write": one, "state": state},
        Scope.VARIANTS: {"rank1": one, "flat": exact_sae(model_name=model.cfg.model_name)},
    }
    yield model, saes, tokens
    model.attachment.detach()


_RESULTS: dict[str, Result] = {}


def result_of(kind: str, world) -> Result:
    model, saes, tokens = world
    if kind not in _RESULTS:
        _RESULTS[kind] = small(kind).run(model, saes[EVALUATIONS[kind].scope], tokens, progress=False)
    return _RESULTS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_class_says_what_it_is(kind: str):
    evaluation = EVALUATIONS[kind]
    description = inspect.getdoc(evaluation) or ""
    assert "erdict" in description or "laim" in description, "the docstring is the page: it states the rule"
    assert evaluation.question.endswith("?")
    assert set(evaluation.answers) <= PAPER_CLAIMS.keys()
    told = settings_of(evaluation.__module__, evaluation.__name__)
    assert all(told[field.name].text for field in dataclasses.fields(evaluation))


@pytest.mark.parametrize("kind", KINDS)
def test_tables_have_the_documented_columns_and_no_nan(kind: str, world):
    result = result_of(kind, world)
    for name, columns in result.evaluation.columns.items():
        table = result.tables[name]
        assert list(table.columns) == list(columns)
        allowed = {column for column, text in columns.items() if "missing" in text or column.endswith("_last")}
        holes = [c for c in table.columns if c not in allowed and bool(table[c].isna().any())]
        assert not holes, f"{name}: {holes}"
    assert result.info["n_edited_runs"] == 0 or result.info["n_edited_runs"] > 0
    json.dumps(result.info, allow_nan=False)


@pytest.mark.parametrize("kind", KINDS)
def test_claims_have_outcomes_and_numbers_of_their_own(kind: str, world):
    claims = result_of(kind, world).claims()
    assert claims
    for claim in claims:
        assert claim.outcome in get_args(Outcome)
        assert claim.number is None or claim.number in EVALUATIONS[kind].answers
        assert claim.sentence and "nan" not in claim.measured.lower()


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_result_is_the_saved_one(kind: str, world, tmp_path):
    result = result_of(kind, world)
    loaded = load_result(result.save(tmp_path / kind))
    assert loaded.evaluation == result.evaluation
    assert loaded.claims() == result.claims()
    assert [f.title for f in loaded.figures()] == [f.title for f in result.figures()]
    for name, table in result.tables.items():
        pd.testing.assert_frame_equal(loaded.tables[name], table, check_dtype=False)


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_pictures_with_titles_of_their_own(kind: str, world):
    figures = result_of(kind, world).figures()
    assert all(figure.svg.startswith("<svg") for figure in figures)
    titles = [figure.svg.split("<title>")[1].split("</title>")[0] for figure in figures]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_tables_and_another_one_runs(kind: str, world):
    model, saes, tokens = world
    again = small(kind).run(model, saes[EVALUATIONS[kind].scope], tokens, progress=False)
    for name, table in result_of(kind, world).tables.items():
        pd.testing.assert_frame_equal(again.tables[name], table, check_exact=True)


@pytest.mark.parametrize("kind", KINDS)
def test_settings_survive_json(kind: str):
    evaluation = small(kind, seed=7, label="x")
    assert EVALUATIONS[kind](**json.loads(json.dumps(evaluation.to_dict()))) == evaluation


@pytest.mark.parametrize("kind", KINDS)
def test_settings_are_checked_when_they_are_made(kind: str):
    with pytest.raises(ValueError, match="rows_per_run"):
        EVALUATIONS[kind](rows_per_run=0)
    for name in EVALUATIONS[kind].bounds():
        with pytest.raises(ValueError, match=name):
            EVALUATIONS[kind](**{name: -1})
    for name in EVALUATIONS[kind].choices():
        with pytest.raises(ValueError, match="nonsense"):
            EVALUATIONS[kind](**{name: ("nonsense",)})


@pytest.mark.parametrize("kind", KINDS)
def test_short_sequences_are_refused_before_any_work(kind: str, world):
    model, saes, tokens = world
    with pytest.raises(ValueError, match="tokens"):
        small(kind).run(model, saes[EVALUATIONS[kind].scope], tokens[:, :1], progress=False)


@pytest.mark.parametrize("kind", KINDS)
def test_one_sequence_is_refused_or_inconclusive(kind: str, world):
    model, saes, tokens = world
    try:
        result = small(kind).run(model, saes[EVALUATIONS[kind].scope], tokens[:1], progress=False)
    except (ValueError, NothingToMeasureError):
        return
    assert {claim.outcome for claim in result.claims()} <= {"inconclusive", "not tested", "below the floor"}


@pytest.mark.parametrize("kind", [k for k in KINDS if EVALUATIONS[k].scope in (Scope.EACH, Scope.LAYER)])
def test_a_dead_dictionary_is_skipped_with_the_reason(kind: str, world, tmp_path):
    model, _, tokens = world
    dead = make_sae(model)
    with torch.no_grad():
        dead.b_enc.fill_(-1e6)
    result = small(kind).run_or_skip(model, dead, tokens, progress=False)
    if result.skipped is None:
        assert {claim.outcome for claim in result.claims()} <= {"not tested", "inconclusive", "below the floor"}
        return
    loaded = load_result(result.save(tmp_path / kind))
    assert loaded.skipped == result.skipped
    assert {claim.outcome for claim in loaded.claims()} == {"not tested"}


@pytest.mark.parametrize("kind", [k for k in KINDS if EVALUATIONS[k].scope.compares])
def test_a_comparison_needs_two_dictionaries(kind: str, world):
    model, saes, tokens = world
    with pytest.raises(ValueError, match="at least two"):
        small(kind).run(model, saes[Scope.EACH], tokens, progress=False)


@pytest.mark.parametrize("kind", [k for k in KINDS if EVALUATIONS[k].scope in (Scope.EACH, Scope.LAYER)])
def test_no_verdict_on_a_handful_of_observations(kind: str, world):
    """Eight firings are no failure."""
    model, saes, tokens = world
    names = {field.name for field in dataclasses.fields(EVALUATIONS[kind])}
    if not {"n_atoms", "firings_per_atom"} <= names:
        pytest.skip("the evaluation draws no firings of atoms")
    result = small(kind, n_atoms=4, firings_per_atom=1).run_or_skip(model, saes[Scope.EACH], tokens, progress=False)
    assert "fails" not in {claim.outcome for claim in result.claims()}


def test_results_with_foreign_names_are_refused(world, tmp_path):
    """Names in files are data: none leaves the folder."""
    folder = result_of("substitution", world).save(tmp_path / "r")
    head = json.loads((folder / "info.json").read_text())
    (folder / "info.json").write_text(json.dumps(head | {"tables": ["../../outside"]}))
    reseal(folder)
    with pytest.raises(ValueError, match="info"):
        load_result(folder)
    (folder / "info.json").write_text(json.dumps(head | {"kind": "unheard"}))
    reseal(folder)
    with pytest.raises(ValueError, match="unheard"):
        load_result(folder)
    (folder / "info.json").write_text("[" * 100_000)
    reseal(folder)
    with pytest.raises(ValueError, match="info"):
        load_result(folder)


def test_every_evaluation_reports_the_work_it_did(world):
    counts = {kind: result_of(kind, world).info["n_edited_runs"] for kind in KINDS}
    assert np.median(list(counts.values())) > 0
