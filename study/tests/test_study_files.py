"""Files and folders that the study's commands write, and results: whole or absent, never over others' work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from results_on_disk import RESULT, make_result
from saes import make_sae
from test_files import (
    Act,
    acting,
    assert_link_is_refused,
    assert_link_to_a_folder_is_refused,
    assert_others_stay,
    assert_taken_name_is_refused,
    each_name,
    shipped_model,
)

FEW = ["--sequences", "4", "--context-size", "48"]
SIGN = ["--kinds", "sign", "--set", "n_positions=2", "--no-control-dictionaries", *FEW]
COMMANDS: dict[str, list[str]] = {
    "report": ["report", "RESULT", "--out", "OUT"],
    "eval": ["eval", "install", "SAE", *FEW, "--out", "OUT"],
    "eval --resume": ["eval", "all", "SAE", *SIGN, "--resume", "--out", "OUT"],
    "reproduce": ["reproduce", "--small", "--out", "OUT"],
}
METHODS: dict[str, Callable[[Path], object]] = {"Result.save": make_result}
RUN = ["report", "eval --resume", *METHODS]
"""Of the others refusals alone are tested: a run takes a minute."""
TAKEN = {
    "report": ["report.html", "report.json", "tables/substitution-firings.parquet"],
    "eval": ["report.html", "install/L2H1/thesis.txt"],
    "reproduce": ["config.json", "texts/held-out.txt", "report/report.html"],
    "Result.save": ["info.json", "firings.parquet", ".DS_Store"],
}
"""Names that a command writes."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Act:
    made = tmp_path_factory.mktemp("made")
    make_result(made / "result")
    make_sae(shipped_model(), d_sae=8, hook="blocks.2.mixer.heads.1.hook_write_vec").save_model(made / "mine")
    return acting(COMMANDS, METHODS, RESULT=made / "result", SAE=made / "mine")


@pytest.mark.parametrize("name", ["info.json", "firings.parquet"])
def test_a_link_in_a_strangers_result_is_refused(tmp_path: Path, name: str) -> None:
    assert_link_is_refused(tmp_path, RESULT, name)


@pytest.mark.parametrize("name", RUN)
def test_the_study_leaves_what_others_wrote(name: str, run: Act, tmp_path: Path) -> None:
    assert_others_stay(run, name, tmp_path, strict=name == "Result.save")


@pytest.mark.parametrize(("name", "file"), each_name(TAKEN))
@pytest.mark.parametrize("link", [False, True], ids=["file", "link"])
def test_the_study_refuses_a_name_that_others_took(name: str, file: str, link: bool, run: Act, tmp_path: Path) -> None:
    assert_taken_name_is_refused(run, name, tmp_path, file, link)


@pytest.mark.parametrize("name", [*COMMANDS, *METHODS])
def test_the_study_writes_nothing_through_a_folder_that_is_a_link(name: str, run: Act, tmp_path: Path) -> None:
    assert_link_to_a_folder_is_refused(run, name, tmp_path)
