"""Every evaluation has a page, and examples that run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from examples import fresh_start, printed
from measured import make_dictionary

from writesae_study import EVALUATIONS

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)\n```$)?", flags=re.MULTILINE | re.DOTALL)
"""A Python block, and what it prints, where that stands below it."""
DICTIONARIES: dict[str, dict[str, Any]] = {"my-sae": {}, "seed-0": {}, "seed-1": {"seed": 1}, "bilinear": {}}
DICTIONARIES["flat"] = {"flat": True}
"""Folders of the dictionaries in the examples of evaluations, as arguments of `measured.make_dictionary`."""


def test_every_evaluation_has_a_page() -> None:
    assert sorted(path.stem for path in (DOCS / "evaluations").glob("*.md") if path.stem != "index") == sorted(
        EVALUATIONS
    )


@pytest.mark.nightly
@pytest.mark.parametrize("name", EVALUATIONS)
def test_examples_of_evaluations_run(name: str, tmp_path: Path) -> None:
    """They answer no claim that the class does not name."""
    for folder, how in DICTIONARIES.items():
        make_dictionary(**how).save_model(tmp_path / folder)
    code = "".join(code for code, _ in BLOCK.findall((DOCS / "evaluations" / f"{name}.md").read_text()))
    code += "assert {claim.number for claim in result.claims()} <= {None, *result.evaluation.answers}\n"
    with fresh_start(tmp_path):
        out = printed(code, f"{name}.md")
    assert len(out.splitlines()) >= 1 and all(" | " in line for line in out.splitlines())
