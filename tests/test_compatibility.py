"""The page on compatibility has the rows that its script runs."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

from compatibility import PAGE, ROWS, called, outcome  # noqa: E402


def test_the_page_has_every_row_and_no_failure():
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    assert [row[0].removeprefix("| ") for row in rows] == [what for what, _, _ in ROWS]
    assert all(row[2].startswith(("works", "refused")) for row in rows)


def test_a_model_as_it_is_works():
    assert outcome(called).startswith("works")
