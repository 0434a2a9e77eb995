"""What an evaluation leaves: folders that appear whole or not at all."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from made_up import FAILS, HOLDS, made_up
from sealing import damages, reseal

from writesae import page as page_folder
from writesae.evaluations import load_result
from writesae.experiment.evaluation import Result


@pytest.fixture(scope="module")
def result() -> Result:
    return made_up(HOLDS, label="mine", scales=("matched",))


def test_a_saved_folder_is_whole_and_has_nothing_beside_it(result: Result, tmp_path: Path) -> None:
    folder = result.save(tmp_path / "deep" / "result")
    assert [p.name for p in folder.parent.iterdir()] == ["result"]
    assert sorted(p.name for p in folder.iterdir()) == ["SHA256SUMS", "example.parquet", "firings.parquet", "info.json"]
    loaded = load_result(folder)
    assert (loaded.info, loaded.evaluation, loaded.skipped) == (result.info, result.evaluation, None)
    pd.testing.assert_frame_equal(loaded.tables["firings"], result.tables["firings"])


def test_a_failed_save_leaves_the_old_folder(result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = result.save(tmp_path / "result")
    before = (folder / "info.json").read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", fail)
    with pytest.raises(OSError, match="disk full"):
        made_up(FAILS).save(folder)
    assert (folder / "info.json").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_new_save_takes_the_place_of_the_old_one(result: Result, tmp_path: Path) -> None:
    result.save(tmp_path / "result")
    other = made_up(FAILS, label="other")
    assert load_result(other.save(tmp_path / "result")).label == "other"


def test_load_says_what_is_wrong(result: Result, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="info"):
        load_result(tmp_path)
    folder = result.save(tmp_path / "result")
    (folder / "firings.parquet").write_bytes(b"cut")
    with pytest.raises(ValueError, match="firings"):
        load_result(folder)
    reseal(folder)
    with pytest.raises(ValueError, match="substitution"):
        load_result(folder)
    (folder / "info.json").write_text('{"cut')
    reseal(folder)
    with pytest.raises(ValueError, match="JSON"):
        load_result(folder)


def test_a_damaged_folder_is_told(result: Result, tmp_path: Path) -> None:
    """Or what it gives is the same: a label that differs by one letter is a valid label."""
    few = replace(result, tables={name: table[:12] for name, table in result.tables.items()})
    folder = few.save(tmp_path / "result")
    silent = []
    for what in damages(folder, ["SHA256SUMS", "info.json"], 200):
        try:
            found = load_result(folder)
        except ValueError as error:
            assert str(folder) in str(error)
        else:
            same = (found.info, found.evaluation) == (few.info, few.evaluation)
            silent += [what] * (not same or not all(found.tables[name].equals(few.tables[name]) for name in few.tables))
    assert not silent
    for name in ("SHA256SUMS", "firings.parquet", "info.json"):
        data = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(ValueError, match=name):
            load_result(folder)
        (tmp_path / name).write_bytes(data)
        (folder / name).symlink_to(tmp_path / name)
        with pytest.raises(ValueError, match=name):
            load_result(folder)
        (folder / name).unlink()
        (folder / name).write_bytes(data)


def test_results_of_the_format_before_are_read(result: Result, tmp_path: Path) -> None:
    """They have no seal."""
    folder = result.save(tmp_path / "result")
    (folder / "SHA256SUMS").unlink()
    (folder / "info.json").write_text((folder / "info.json").read_text().replace('"format": 3', '"format": 2'))
    assert load_result(folder).info == result.info


def test_tables_are_checked(result: Result) -> None:
    with pytest.raises(ValueError, match="firings"):
        replace(result, tables={}).check()
    with pytest.raises(ValueError, match="cosine"):
        replace(result, tables=result.tables | {"firings": result.tables["firings"].drop(columns="cosine")}).check()


def test_what_was_left_out_is_noted() -> None:
    some = made_up(HOLDS, scales=("matched",))
    counted = replace(some, info=some.info | {"n_skipped": {"zero writes": 1200, "none": 0}})
    assert [note for note in counted.notes() if note.startswith("Left out")] == ["Left out: 1,200 (zero writes)."]
    skipped = replace(some, tables={}, skipped="no atom fires")
    assert skipped.notes() == ["no atom fires"] and skipped.figures() == [] and skipped.details() == {}
    assert {c.outcome for c in skipped.claims()} == {"not tested"}


def test_a_figure_in_a_notebook_has_the_colours_of_a_light_page(result: Result) -> None:
    page = Path(page_folder.__file__).with_name("style.css").read_text(encoding="utf-8").split("@media")[0]
    colours = re.compile(r"--(\w+): ?(#\w+);")
    for figure in result.figures():
        shown = figure._repr_html_()
        found = dict(colours.findall(shown))
        assert set(re.findall(r"var\(--(\w+)\)", figure.svg)) <= found.keys()
        assert found.items() <= dict(colours.findall(page)).items() and figure.svg in shown
