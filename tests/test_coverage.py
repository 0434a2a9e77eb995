"""The page of the paper's coverage has every claim, and each command on it is one that the program takes."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import tyro

from writesae import EVALUATIONS
from writesae.cli import COMMANDS, parse
from writesae.dictionaries import Train
from writesae.evaluate import Report, Subjects
from writesae.show import Show
from writesae.verdict.paper import PAPER_CLAIMS

PAGE = (Path(__file__).parents[1] / "docs" / "coverage.md").read_text(encoding="utf-8")
ROWS = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ")]
COMMANDS_SHOWN = re.findall(r"\| `(writesae (?:eval|report|show|train) .*?)` \|", PAGE.partition("## Claims")[2])


def test_every_claim_is_on_the_page_with_an_evaluation_that_answers_it() -> None:
    rows = {int(row[0]): row for row in ROWS if row[0].isdigit()}
    assert rows.keys() == PAPER_CLAIMS.keys()
    for number, row in rows.items():
        kind = row[3].strip("`").split()[2]
        assert number in EVALUATIONS[kind].answers and row[1].replace("&lt;", "<") == PAPER_CLAIMS[number].claim


@pytest.mark.parametrize("command", sorted(set(COMMANDS_SHOWN)))
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
