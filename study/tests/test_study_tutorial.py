"""The study's tutorial runs from a clean start, and is committed with outputs and no trace of the machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_tutorials import test_is_short_whole_and_holds_nothing_of_the_machine as assert_whole
from test_tutorials import test_runs as assert_runs

NOTEBOOK = Path(__file__).parents[1] / "tutorials" / "7_the_papers_test.ipynb"


@pytest.mark.nightly
def test_the_tutorial_runs(tmp_path: Path) -> None:
    assert_runs(NOTEBOOK, tmp_path)


def test_the_tutorial_is_committed_as_it_ran() -> None:
    assert_whole(NOTEBOOK)
