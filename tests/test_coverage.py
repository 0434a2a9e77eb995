"""The page of the paper's coverage is that of the code, and each command on it is one that the program takes."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

import coverage_page  # noqa: E402

from writesae import EVALUATIONS  # noqa: E402
from writesae.cli import COMMANDS, parse  # noqa: E402
from writesae.dictionaries import Train  # noqa: E402
from writesae.evaluate import Report, Subjects  # noqa: E402
from writesae.show import Show  # noqa: E402
from writesae.verdict.paper import PAPER_CLAIMS  # noqa: E402


def test_the_page_is_the_one_that_the_script_writes() -> None:
    """`python scripts/coverage_page.py` writes it."""
    assert coverage_page.PAGE.read_text(encoding="utf-8") == coverage_page.page()


def test_every_claim_is_answered_by_an_evaluation() -> None:
    answered = {number for each in EVALUATIONS.values() for number in each.answers}
    assert answered == PAPER_CLAIMS.keys()


@pytest.mark.parametrize("command", sorted(set(coverage_page.commands())))
def test_every_command_parses(command: str) -> None:
    program, name, *arguments = command.split()
    assert program == "writesae" and name in COMMANDS
    if name == "eval":
        kind, *rest = arguments
        fields = [("subjects", tyro.conf.OmitArgPrefixes[Subjects])]
        fields += [("evaluation", tyro.conf.OmitArgPrefixes[EVALUATIONS[kind]])]
        parsed = parse(dataclasses.make_dataclass("Eval", fields), "writesae eval", rest)
        assert parsed.subjects.saes and parsed.evaluation.kind == kind  # pyright: ignore
    else:
        known = {"report": Report, "show": Show, "train": Train}
        assert isinstance(parse(known[name], f"writesae {name}", arguments), known[name])


def test_what_is_left_out_has_a_reason() -> None:
    parts = coverage_page.PARTS
    assert all(part.where for part in parts) and {part.command == "" for part in parts} == {True, False}
