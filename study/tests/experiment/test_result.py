"""What an evaluation leaves: files that are checked when they are read, and judged by the rules of the day."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from made_up import HOLDS, made_up
from sealing import reseal

from writesae_study.evaluations import load_result, substitution
from writesae_study.experiment.evaluation import Result
from writesae_study.verdict.names import NAMES


@pytest.fixture(scope="module")
def result() -> Result:
    whole = made_up(HOLDS, label="mine", scales=("matched",))
    return replace(whole, tables={name: table[:12] for name, table in whole.tables.items()})


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        *((name, None, name) for name in ("SHA256SUMS", "firings.parquet", "info.json")),
        ("firings.parquet", "cut", "substitution"),
        ("info.json", '{"cut', "JSON"),
        ("info.json", "[" * 100_000, "info"),
        ("info.json", '{"format": 3, "kind": "unheard"}', "unheard"),
        ("info.json", '{"format": 2, "kind": "substitution"}', "format 2"),
        ("info.json", '{"format": 3, "kind": "substitution"}', "skipped"),
    ],
)
def test_a_file_that_is_missing_or_something_else_is_named(
    result: Result, tmp_path: Path, name: str, content: str | None, word: str
) -> None:
    folder = result.save(tmp_path / "result")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
        reseal(folder)
    with pytest.raises(ValueError, match=word):
        load_result(folder)


def test_a_table_without_its_columns_is_refused(result: Result, tmp_path: Path) -> None:
    fewer = replace(result, tables=result.tables | {"firings": result.tables["firings"].drop(columns="cosine")})
    with pytest.raises(ValueError, match="cosine"):
        load_result(fewer.save(tmp_path / "result"))


def test_other_rules_are_said_where_they_give_another_verdict_or_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the rules compute counts, and neither their source nor their words."""
    made = made_up(HOLDS, scales=("matched",), controls=("state", "shuffled"))
    measured = made.info | {"rules": made.judged()}

    def judged_now() -> tuple[Result, bool]:
        result = replace(made, info=measured)
        return result, any("the rules of verdicts gave other" in note for note in result.notes())

    assert not judged_now()[1]
    with monkeypatch.context() as context:
        context.setitem(NAMES, "shuffled", "a second atom")
        renamed, others = judged_now()
        assert any("a second atom" in claim.controls for claim in renamed.claims()) and not others
    drawn_anew = replace(made, evaluation=replace(made.evaluation, seed=5))
    assert drawn_anew.judged() != made.judged()  # intervals count
    monkeypatch.setattr(substitution, "RELEVANT_SHARE", 0.99)
    assert judged_now()[1]
