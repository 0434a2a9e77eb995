"""The page over saved results: its numbers are theirs, it needs nothing from outside, and no label is markup."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import pytest
from made_up import CONFOUNDED, FAILS, HOLDS, NO_EFFECT, made_up

from writesae.evaluations import EVALUATIONS, load_result
from writesae.evaluations.sign import Sign
from writesae.evaluations.substitution import Substitution
from writesae.experiment.evaluation import Result
from writesae.page import report
from writesae.page.report import ReportFiles, find_results, in_order, write_report
from writesae.page.template import markdown
from writesae.verdict import format as fmt
from writesae.verdict.paper import PAPER_CLAIMS, Outcome

EVIL = "<script>alert(1)</script>"
FEW: dict[str, Any] = {"scales": ("matched",), "controls": ("state", "shuffled"), "n_sequences": 12}


class Page(HTMLParser):
    """Text, tags and links of a page; unbalanced tags raise."""

    void = ("meta", "br", "path", "use", "link")

    def __init__(self, source: str):
        super().__init__()
        self.text, self.open, self.links, self.tags = "", [], [], []
        self.feed(source)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.void:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "title"} & set(self.open):
            self.text += re.sub(r"\s+", " ", data)


def skipped(label: str, reason: str) -> Result:
    """A result of which nothing could be measured."""
    info = made_up(HOLDS, label=label, **FEW).info
    return Result(Sign(label=label), {**info, "target": "write"}, {}, skipped=reason)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of results, as `writesae eval` and `writesae reproduce` leave them."""
    folder = tmp_path_factory.mktemp("results")
    made = {"of states": CONFOUNDED, "of writes": HOLDS, EVIL: FAILS, "silent": NO_EFFECT}
    for i, (label, medians) in enumerate(made.items()):
        target = "state" if label == "of states" else "write"
        result = made_up(medians, label=label, target=target, floor=1e-12, seed=i, **FEW)
        result.save(folder / str(i) / "substitution")
    skipped("a dead one", "no atom <fires>").save(folder / "dead" / "sign")
    made_up(FAILS, **FEW).save(folder / ".unfinished")
    return folder


@pytest.fixture(scope="module")
def files(saved: Path) -> ReportFiles:
    return write_report(find_results([saved]), saved / "report" / "report.html")


@pytest.fixture(scope="module")
def page(files: ReportFiles) -> Page:
    return Page(files.html.read_text())


def test_results_are_found_and_ordered(saved: Path) -> None:
    """Hidden folders are unfinished ones. Dictionaries of writes come first; what was not measured comes last."""
    results = in_order(find_results([saved]))
    assert [r.label for r in results] == ["of writes", EVIL, "silent", "of states", "a dead one"]
    kinds = [replace(made_up(HOLDS, **FEW), evaluation=EVALUATIONS[kind]()) for kind in reversed(EVALUATIONS)]
    assert [r.kind for r in in_order(kinds)] == list(EVALUATIONS)


def test_every_answer_is_on_the_page_in_json_and_in_csv(saved: Path, files: ReportFiles, page: Page) -> None:
    answers = {(r.label, c.claim): c for r in find_results([saved]) for c in r.claims()}
    numbers = json.loads(files.json.read_text())
    assert {(row["label"], row["claim"]) for row in numbers["claims"]} >= answers.keys()
    for row in numbers["claims"]:
        claim = answers.get((row["label"], row["claim"]))
        assert claim is None or (row["measured"], row["n"], row["outcome"]) == (claim.measured, claim.n, claim.outcome)
        assert row["number"] is None or row["paper"] == PAPER_CLAIMS[row["number"]].value
        assert re.sub(r"\s+", " ", row["measured"]) in page.text and row["sentence"] in page.text
    assert [row["number"] for row in numbers["claims"]] == sorted(row["number"] for row in numbers["claims"])
    first = numbers["results"][0]
    assert Substitution.from_dict(first["settings"]) == load_result(saved / "1" / "substitution").evaluation


def test_the_files_beside_the_page_hold_everything(saved: Path, files: ReportFiles) -> None:
    claims = pd.read_csv(files.html.with_name("claims.csv"))
    numbers = json.loads(files.json.read_text())["claims"]
    assert claims["measured"].str.removeprefix("'").tolist() == [row["measured"] for row in numbers]
    assert claims["sentence"].notna().all()
    firings = pd.read_parquet(files.html.parent / "tables" / "substitution-firings.parquet")
    tables = [r.tables["firings"] for r in find_results([saved]) if r.skipped is None]
    assert len(firings) == sum(map(len, tables)) and {"label", "layer", "head"} <= set(firings.columns)
    assert sorted(p.name for p in (files.html.parent / "tables").iterdir()) == [
        "substitution-example.parquet",
        "substitution-firings.parquet",
    ]


def test_no_label_and_no_reason_puts_markup_into_the_page(files: ReportFiles, page: Page) -> None:
    source = files.html.read_text()
    assert "script" not in page.tags and EVIL in page.text and "no atom <fires>" in page.text
    assert EVIL not in source and "&lt;script&gt;" in source


def test_a_docstring_is_markdown_without_html() -> None:
    html = str(markdown("A **win** is:\n\n* one\n* two\n\n<b>no</b> & `a < b`"))
    assert "<strong>win</strong>" in html and html.count("<li>") == 2
    assert "<b>" not in html and "&lt;b&gt;" in html and "<code>a &lt; b</code>" in html


def test_the_title_is_escaped(tmp_path: Path) -> None:
    source = write_report([made_up(HOLDS, **FEW)], tmp_path / "page", title="a < b").html.read_text()
    assert "<title>a &lt; b</title>" in source


def test_the_page_is_self_contained(page: Page, files: ReportFiles) -> None:
    source = files.html.read_text()
    assert [link for link in page.links if not link.startswith("#")] == []
    assert "@import" not in source and "url(http" not in source
    assert {link[1:] for link in page.links} <= set(re.findall(r'id="([^"]+)"', source))
    assert page.tags.count("svg") == 1 + 4 * 4  # one at the top, four of each measured dictionary
    assert source.count("prefers-color-scheme: dark") == 1 and "@media print" in source and "viewport" in source


def test_figures_follow_the_colours_of_the_page(files: ReportFiles) -> None:
    source = files.html.read_text()
    for figure in re.findall(r"<svg.*?</svg>", source, flags=re.S):
        ElementTree.fromstring(figure)  # well-formed
        assert not re.findall(r"#[0-9a-fA-F]{6}", figure)
    assert set(re.findall(r"var\(--([a-z]+)\)", source)) <= set(re.findall(r"--([a-z]+):", source))
    ids = re.findall(r'<clipPath id="([^"]+)"', source)
    assert len(ids) == len(set(ids))  # a clip path of one figure must not cut another


def test_claims_that_nothing_answers_are_listed_with_what_would(page: Page) -> None:
    assert "12. substitution on RWKV-7 (needs the evaluation substitution on an RWKV-7 model)" in page.text
    assert "5. all heads of a layer (needs the evaluation substitution on several heads)" in page.text
    assert not re.search(r"\b1\. an atom is nearer[^(]*\(needs", page.text)  # answered
    assert not re.search(r"\b9\. the sign[^(]*\(needs", page.text)  # "not tested" is an answer, with its reason


def test_what_could_not_be_measured_has_a_section_of_its_own(page: Page, files: ReportFiles) -> None:
    rows = [row for row in json.loads(files.json.read_text())["claims"] if row["outcome"] == "not tested"]
    assert {row["number"] for row in rows} == set(Sign.answers)
    assert page.text.index("What could not be measured") < page.text.index("sign of a dead one")


def test_control_dictionaries_stand_beside_the_trained_one_and_quality_at_the_top(tmp_path: Path) -> None:
    quality: dict[str, Any] = {"target": "write", "n_sequences": 64, "n_tokens": 8192, "explained": 0.25, "l0": 1.5}
    quality |= {"alive": 0.5, "coverage": 0.75, "cosine": None, "start_cosine": 0.84, "floor": 0.0}
    quality |= {"deleted": {"mean": 0.081, "low": None, "high": None, "n": 64, "n_clusters": 64}}
    recovered = {"mean": 0.59, "low": 0.5, "high": 0.65, "n": 64, "n_clusters": 64}
    made = made_up(HOLDS, label="mine", **FEW)
    trained = replace(made, info=made.info | {"quality": {"mine": quality | {"recovered": recovered}}})
    beside = replace(made, info=made.info | {"label": "mine, untrained", "control": "untrained", "control_of": "mine"})
    beside.info["quality"] = {"mine, untrained": quality | {"recovered": None, "explained": None}}
    files = write_report([trained, beside], tmp_path / "page")
    page, numbers = Page(files.html.read_text()), json.loads(files.json.read_text())
    assert "59.0% [50.0, 65.0]" in page.text and page.text.index("59.0") < page.text.index("Claims, the paper")
    assert "mine, untrained" in page.text and "control dictionaries: untrained" in page.text
    assert {row["label"] for row in numbers["claims"]} == {"mine"}
    assert "confounded" in {row["outcome"] for row in numbers["claims"]}
    assert [row["dictionary"] for row in numbers["quality"]] == ["mine", "mine, untrained"]
    assert page.tags.count("h3") == 1  # figures are those of the trained one
    table = pd.read_parquet(files.html.parent / "tables" / "substitution-firings.parquet")
    assert set(table["label"]) == {"mine", "mine, untrained"}


def test_the_lead_counts_outcomes_and_intervals(tmp_path: Path) -> None:
    """At 0.025 for each answer that has an interval, by luck; the others do not count."""
    results = [made_up(HOLDS, label="a", **FEW), made_up(CONFOUNDED, label="b", **FEW), skipped("c", "nothing")]
    rows = report.claim_rows(results)
    words = Page(write_report(results, tmp_path / "page").html.read_text()).text
    counts = Counter(report.outcome_text(row.claim.outcome) for row in rows)
    assert all(f"{outcome} {n}" in words for outcome, n in counts.items()) and "confounded by a control" in counts
    n = sum("[" in row.claim.measured for row in rows)
    assert 1 < n < len(rows) and f"{n} of the answers have a 95% interval" in words
    assert f"would be {0.025 * n:.2f}" in words and f"answers) {1 - 0.975**n:.2f}." in words
    outcomes: list[Outcome] = ["holds", "fails", "undecided", "inconclusive", "below the floor", "not tested"]
    assert [report.outcome_text(each) for each in outcomes] == outcomes


def test_folders_without_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        find_results([tmp_path])
    (tmp_path / "info.json").write_text(json.dumps({"format": 1, "kind": "guess"}))
    with pytest.raises(ValueError, match="format"):
        find_results([tmp_path])
    with pytest.raises(ValueError, match="none"):
        write_report([], tmp_path / "page")


def test_how_numbers_are_written() -> None:
    assert fmt.percent(0.8725) == "87.2%" and fmt.percent(float("nan")) == "–"
    assert [fmt.number(x) for x in (0, 1.2345, 0.0123, 3.2e-13, 12345)] == [
        "0",
        "1.23",
        "0.0123",
        "3.2·10⁻¹³",
        "1.23e+04",
    ]
    assert fmt.span(0.5, 0.625) == "50.0–62.5" and fmt.span(float("nan"), 1) == "–"
    assert fmt.span(-0.5, -0.25) == "-50.0 to -25.0"
