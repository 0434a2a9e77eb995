"""The page of coverage has every claim and commands that parse; pages of results follow from the saved tables."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import tyro
from made_up import CONFOUNDED, FAILS, HOLDS, made_up

from writesae import EVALUATIONS
from writesae.cli import COMMANDS, parse
from writesae.dictionaries import Train
from writesae.evaluate import Report, Subjects
from writesae.show import Show
from writesae.verdict.paper import PAPER_CLAIMS

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

import results  # noqa: E402

PAGE = (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8")
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
        kind = EVALUATIONS[arguments[0]]
        fields = [(each.__name__, tyro.conf.OmitArgPrefixes[each]) for each in (Subjects, kind)]
        parsed = parse(dataclasses.make_dataclass("Eval", fields), "writesae eval", arguments[1:])
        assert parsed.Subjects.saes and isinstance(getattr(parsed, kind.__name__), kind)  # pyright: ignore
    else:
        assert parse({"report": Report, "show": Show, "train": Train}[name], f"writesae {name}", arguments)


def test_packed_results_have_the_verdicts_of_the_saved_ones_in_few_bytes(tmp_path: Path) -> None:
    """Labels and heads may be equal in two models; half-written results are left out."""
    claims = []
    for model, medians in {"embedded": HOLDS, "embedded-mamba2": CONFOUNDED, "embedded-rwkv7": FAILS}.items():
        measured = made_up(medians, label="write-seed0", per_sequence=4)
        measured.info.update({"model": model})
        for label in ("write-seed0", ".write-seed0.x"):
            measured.save(tmp_path / "runs" / "paper" / model / "L1H2" / "substitution" / label)
        claims += [(model, claim.claim, claim.outcome) for claim in measured.claims()]
    results.pack(tmp_path / "runs", tmp_path / "packed")
    rows = results.answered(results.unpack(tmp_path / "packed"), "substitution")
    assert sorted((row[2], row[1], row[-1]) for row in rows) == sorted(claims)
    saved, packed = (sum(f.stat().st_size for f in (tmp_path / n).rglob("[!.]*.parquet")) for n in ("runs", "packed"))
    assert packed < saved / 8


@pytest.mark.parametrize("of", ["embedded;L4H2", pytest.param("", marks=pytest.mark.slow)])
def test_the_pages_of_results_follow_from_the_tables(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line of one head; of all heads each byte."""
    found = {recipe: [x for x in own if of in x.label] for recipe, own in results.unpack(ROOT / "docs/results").items()}
    monkeypatch.setattr(results, "unpack", lambda folder: found)
    for name, made in results.pages(ROOT / "docs").items():
        page, cells = (ROOT / "docs" / name).read_text(encoding="utf-8"), of.replace(";", " | ")
        assert made == page if not of else {x for x in made.splitlines() if cells in x} <= {*page.splitlines()}
