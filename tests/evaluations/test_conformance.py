"""What every evaluation promises, whatever it asks: found by its class, so that a new one is tested too.

The results are those that the golden tables are compared with.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import get_args

import pandas as pd
import pytest
import torch
from golden.cases import WRITE
from golden.dictionaries import load_model, make_dictionary, sequences
from golden.make import FIRST, result_of

from writesae.evaluations import EVALUATIONS, load_result
from writesae.experiment.evaluation import Scope
from writesae.verdict.paper import PAPER_CLAIMS, Outcome

KINDS = sorted(EVALUATIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_class_says_what_it_is_and_checks_its_settings(kind: str) -> None:
    made = EVALUATIONS[kind]
    description = inspect.getdoc(made) or ""
    assert "erdict" in description or "laim" in description, "the docstring is the page: it states the rule"
    assert made.question.endswith("?") and set(made.answers) <= PAPER_CLAIMS.keys()
    evaluation = dataclasses.replace(result_of(FIRST.get(kind, kind)).evaluation, seed=7, label="x")
    assert made.from_dict(json.loads(json.dumps(evaluation.to_dict()))) == evaluation
    wrong = {name: -1 for name in made.bounds()} | {name: ("nonsense",) for name in made.choices()}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            made.from_dict({name: value})


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_is_what_the_class_documents_and_the_same_when_loaded(kind: str, tmp_path: Path) -> None:
    result = result_of(FIRST.get(kind, kind))
    for name, columns in EVALUATIONS[kind].columns.items():
        table = result.tables[name]
        allowed = {column for column, text in columns.items() if "missing" in text or column.endswith("_last")}
        assert list(table.columns) == list(columns) and len(table)
        assert not [c for c in table.columns if c not in allowed and bool(table[c].isna().any())], name
    claims = result.claims()
    for claim in claims:
        assert claim.outcome in get_args(Outcome) and claim.sentence and "nan" not in claim.measured.lower()
        assert claim.number is None or claim.number in EVALUATIONS[kind].answers
    titles = [figure.svg.split("<title>")[1].split("</title>")[0] for figure in result.figures()]
    assert claims and len(set(titles)) == len(titles)
    loaded = load_result(result.save(tmp_path / kind))
    assert (loaded.evaluation, loaded.info, loaded.claims()) == (result.evaluation, result.info, claims)
    for name, table in result.tables.items():
        pd.testing.assert_frame_equal(loaded.tables[name], table, check_dtype=False)


@pytest.mark.parametrize("kind", KINDS)
def test_poor_input_is_refused_or_gives_no_verdict(kind: str, tmp_path: Path) -> None:
    evaluation, model = result_of(FIRST.get(kind, kind)).evaluation, load_model("embedded")
    tokens, labels = sequences("embedded", 48)[:8], ("a", "b") if evaluation.scope.compares else ("a",)
    dead = {label: make_dictionary("embedded", **WRITE) for label in labels}  # type: ignore[arg-type]
    with torch.no_grad():
        for sae in dead.values():
            sae.b_enc.fill_(-1e6)
    with pytest.raises(ValueError, match="tokens"):
        evaluation.run(model, dead, tokens[:, :1], progress=False)
    with pytest.raises(ValueError, match="got"):  # two where one is asked for, or one for two
        evaluation.run(model, {"a": dead["a"]} if len(dead) > 1 else dead | {"b": dead["a"]}, tokens, progress=False)
    for some in (tokens[:1], tokens):
        try:
            result = evaluation.run(model, dead, some, progress=False, or_skip=True)
        except ValueError:  # one sequence
            assert len(some) == 1
            continue
        loaded = load_result(result.save(tmp_path / kind))
        outcomes = {claim.outcome for claim in loaded.claims()}
        assert loaded.skipped == result.skipped
        if result.skipped is not None:
            assert outcomes == {"not tested"}
        elif evaluation.scope in (Scope.EACH, Scope.LAYER) or len(some) == 1:
            assert outcomes <= {"not tested", "inconclusive", "below the floor"}
