"""The page over saved results: its numbers are theirs, it needs nothing from outside, and no label is markup."""

from __future__ import annotations

import html as html_of
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from made_up import CONFOUNDED, FAILS, HOLDS, NO_EFFECT, made_up

from writesae_study.evaluations import EVALUATIONS
from writesae_study.evaluations.sign import Sign
from writesae_study.experiment.evaluation import Result
from writesae_study.page.report import find_results, in_order, write_report

EVIL = "<script>alert(1)</script>"
FEW: dict[str, Any] = {"scales": ("matched",), "controls": ("state", "shuffled"), "n_sequences": 12}


def words(page: Path) -> str:
    """The text of a page."""
    text = re.sub(r"<(style|title|script)\b.*?</\1>|<[^>]+>", "", page.read_text(), flags=re.DOTALL)
    return re.sub(r"\s+", " ", html_of.unescape(text))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of results, as `writesae eval` and `writesae reproduce` leave them."""
    folder = tmp_path_factory.mktemp("results")
    made = {"of states": CONFOUNDED, "of writes": HOLDS, EVIL: FAILS, "silent": NO_EFFECT}
    for i, (label, medians) in enumerate(made.items()):
        target = "state" if label == "of states" else "write"
        result = made_up(medians, label=label, target=target, floor=1e-12, seed=i, **FEW)
        result.save(folder / str(i) / "substitution")
    info = made_up(HOLDS, label="a dead one", **FEW).info
    Result(Sign(label="a dead one"), info, {}, skipped="no atom <fires>").save(folder / "dead" / "sign")
    made_up(FAILS, **FEW).save(folder / ".unfinished")
    return folder


@pytest.fixture(scope="module")
def html(saved: Path) -> Path:
    return write_report(find_results([saved]), saved / "report" / "report.html")


def test_results_are_found_and_ordered(saved: Path) -> None:
    """Hidden folders are unfinished ones. Dictionaries of writes come first; what was not measured comes last."""
    results = in_order(find_results([saved]))
    assert [r.label for r in results] == ["of writes", EVIL, "silent", "of states", "a dead one"]
    kinds = [replace(made_up(HOLDS, **FEW), evaluation=EVALUATIONS[kind]()) for kind in reversed(list(EVALUATIONS))]
    assert [r.kind for r in in_order(kinds)] == list(EVALUATIONS)


def test_every_answer_is_on_the_page_and_in_json(saved: Path, html: Path) -> None:
    numbers, text = json.loads(html.with_suffix(".json").read_text()), words(html)
    rows = {(row["label"], row["claim"]): row for row in numbers["claims"]}
    for result in find_results([saved]):
        for claim in result.claims():
            row = rows.pop((result.label, claim.claim))
            assert {name: row[name] for name in vars(claim)} == vars(claim) and row["paper"] == claim.paper
            for shown in (*claim.measured.split("; "), *claim.controls.split("; "), claim.sentence):
                assert " ".join(shown.split()) in text
    assert not rows
    assert [row["number"] for row in numbers["claims"]] == sorted(row["number"] for row in numbers["claims"])


def test_the_page_is_self_contained_and_figures_follow_its_colors(html: Path) -> None:
    source = html.read_text()
    figures, links = re.findall(r"<svg.*?</svg>", source, flags=re.S), re.findall(r'(?:src|href)="([^"]*)"', source)
    assert EVIL not in source and source.count("<script") == 1
    assert {*links} <= {f"#{name}" for name in re.findall(r'id="([^"]+)"', source)} and "@import" not in source
    for figure in map(ElementTree.fromstring, figures):  # well-formed
        assert not re.findall(r"(?<!,)#[0-9a-fA-F]{6}", ElementTree.tostring(figure, "unicode"))  # but as defaults
    assert set(re.findall(r"var\(--([a-z]+)\)", source)) <= set(re.findall(r"--([a-z]+):", source))
    ids = re.findall(r'<clipPath id="([^"]+)"', source)
    assert len(figures) > 4 and len(ids) == len(set(ids))  # a clip path of one figure must not cut another
