"""The page of coverage has commands that parse; pages of results have every claim, and follow from the saved tables."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tyro
from made_up import CONFOUNDED, FAILS, HOLDS, made_up

from writesae.cli import commands, parse
from writesae.flags import Show, Train
from writesae_study import EVALUATIONS
from writesae_study.evaluate import Report, Subjects
from writesae_study.experiment.evaluation import Result
from writesae_study.verdict.paper import PAPER_CLAIMS

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "tools"), str(ROOT.parent / "tools")]

import results  # noqa: E402

PAGE = (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8")
COMMANDS_SHOWN = re.findall(r"\| `(writesae (?:eval|report|show|train) .*?)` \|", PAGE)


def test_every_claim_is_on_the_page_of_results_with_an_evaluation_that_answers_it() -> None:
    table = (
        (ROOT / "docs" / "results.md").read_text(encoding="utf-8").partition("\n## Claims\n")[2].partition("\n## ")[0]
    )
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if re.match(r"\| \d", line)]
    assert [int(number) for number, *_ in rows] == [*PAPER_CLAIMS]
    for number, claim, _, asked, *_ in rows:
        kind = re.fullmatch(r"\[(\w+)\]\(evaluations/\1.md\)", asked)
        assert kind and int(number) in EVALUATIONS[kind[1]].answers
        assert claim.replace("&lt;", "<") == PAPER_CLAIMS[int(number)].claim


@pytest.mark.parametrize("command", sorted(set(COMMANDS_SHOWN)))
def test_every_command_parses(command: str) -> None:
    program, name, *arguments = command.split()
    assert program == "writesae" and name in commands()
    if name == "eval":
        kind = EVALUATIONS[arguments[0]]
        fields = [(each.__name__, tyro.conf.OmitArgPrefixes[each]) for each in (Subjects, kind)]
        parsed = parse(dataclasses.make_dataclass("Eval", fields), "writesae eval", arguments[1:])
        assert parsed.Subjects.saes and isinstance(getattr(parsed, kind.__name__), kind)  # pyright: ignore
    else:
        assert parse({"report": Report, "show": Show, "train": Train}[name], f"writesae {name}", arguments)


def test_packed_results_have_the_verdicts_of_the_saved_ones_in_few_bytes(tmp_path: Path) -> None:
    """Labels and heads may be equal in two models; half-written results are left out."""
    verdicts, runs, packed = [], tmp_path / "runs", tmp_path / "packed"
    for model, medians in {"embedded": FAILS, "embedded-mamba2": CONFOUNDED}.items():
        measured = made_up(medians, label="write-seed0", per_sequence=4)
        measured.info["model"] = model
        for label in ("write-seed0", ".write-seed0.x"):
            measured.save(runs / "paper" / model / "L1H2" / "substitution" / label)
        outcomes = {"holds": "no verdict"}  # without control dictionaries
        verdicts += [(model, claim.claim, outcomes.get(claim.outcome, claim.outcome)) for claim in measured.claims()]
    results.pack(runs, packed)
    rows = results.answered(results.unpack(packed), "substitution")
    assert sorted((row[2], row[1], row[-1]) for row in rows) == sorted(verdicts)
    assert all(result.info["rules"] == result.judged() for _, result in results.packed(packed))
    sizes = [sum(file.stat().st_size for file in each.rglob("[!.]*.parquet")) for each in (runs, packed)]
    assert sizes[1] < sizes[0] / 4


@pytest.mark.parametrize(("control", "outcome"), [(HOLDS, "confounded"), (FAILS, "holds"), (None, "no verdict")])
@pytest.mark.parametrize(("null", "free"), [(HOLDS, True), (FAILS, False), (None, False)])
def test_a_claim_needs_control_dictionaries_and_is_counted_apart_where_nothing_was_learned(
    control: dict[str, float] | None, outcome: str, null: dict[str, float] | None, free: bool
) -> None:
    def run(medians: dict[str, float] | None, **info: str) -> list[Result]:
        """None where these medians are."""
        how: Any = {"label": "made-up;L1H2", "scales": ("matched",), "controls": ("state",)}
        made = [] if medians is None else [made_up(medians, **how)]
        return [dataclasses.replace(result, info=result.info | info) for result in made]

    runs = dict.fromkeys([*results.RECIPES, *results.NULLS], run(None))
    runs["paper"] = run(HOLDS) + run(control, control="untrained", control_of="made-up;L1H2")
    runs["untrained-shuffled"] = run(null)
    first = results.answered(runs, "substitution")[0]
    assert first[-1] == outcome
    held = results.without_learning(runs, "substitution")[first[0], first[1], first[2]]
    assert results.of_any_direction("substitution", held) == (free or control is HOLDS)
    assert results.of_any_direction("sign", {})  # which asks no dictionary


@pytest.mark.nightly  # half a minute, of pages that few changes touch
def test_the_pages_of_results_follow_from_the_tables() -> None:
    pages, answers = results.pages(ROOT / "docs" / "results")
    for name, made in pages.items():
        assert made == (ROOT / "docs" / name).read_text(encoding="utf-8")
    pd.testing.assert_frame_equal(answers, pd.read_parquet(ROOT / "docs/results/answers.parquet"))


def test_readme_counts_answers_as_the_page_does() -> None:
    page, readme = (
        " ".join(file.read_text(encoding="utf-8").split())
        for file in (ROOT / "docs/results.md", ROOT.parent / "README.md")
    )
    (counted,) = re.findall(r"are (\d+) answers\. .* hold in (\d+), and \d+ more .* that hold, (\d+) also", page)
    pattern = (
        r"Of (\d+) answers about matrix atoms, (\d+) hold with all controls\. Of these, (\d+) also hold for writes"
    )
    assert re.findall(pattern, readme) == [counted]
    assert int(counted[2]) == page.count("* Holds, training added nothing:")
