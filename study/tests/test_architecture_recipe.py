"""The recipe "an evaluation is one file": with `recipe/repeat.py` in the package, everything else, the command, the
conformance tests and the report, finds it by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from evaluations import test_conformance as conformance
from measured import result_of

from writesae_study import evaluations
from writesae_study.evaluate import run_eval
from writesae_study.page.report import write_report

RECIPE = Path(__file__).parent / "recipe" / "repeat.py"


@pytest.fixture
def _added(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is where evaluations are looked for."""
    monkeypatch.setattr(evaluations, "__file__", str(RECIPE))
    monkeypatch.setitem(evaluations.ASKED, "repeat", evaluations._asked_questions()["repeat"])
    monkeypatch.setattr(evaluations, "__path__", [*evaluations.__path__, str(RECIPE.parent)])


@pytest.mark.usefixtures("_added")
def test_everything_finds_the_new_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_eval(["repeat", "--help"])
    assert "--n-positions" in capsys.readouterr().out
    conformance.test_the_class_says_what_it_is_and_checks_its_settings("repeat")
    conformance.test_a_result_is_what_the_class_documents_and_the_same_when_loaded("repeat", tmp_path / "result")
    conformance.test_poor_input_is_refused_or_gives_no_verdict("repeat", tmp_path / "poor")
    conformance.test_a_question_about_a_head_needs_no_dictionary("repeat")
    result = result_of("repeat")
    (claim,) = result.claims()
    page = write_report([result], tmp_path / "report").read_text()
    assert "Does a repeated write disturb more than a missing one?" in page and claim.sentence in page
    assert "<strong>Control.</strong>" in page  # its docstring is its page


def test_the_recipe_is_short() -> None:
    assert len(RECIPE.read_text(encoding="utf-8").splitlines()) <= 115
