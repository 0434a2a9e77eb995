"""The report: its numbers are the summary's, it needs nothing from outside, and it survives odd inputs."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import fake_substitution as fake
import pandas as pd
import pytest
from fake_substitution import CONFOUNDED, FAILS, HOLDS, NO_EFFECT

from sae_lens_writesae import plots, report_text
from sae_lens_writesae.conditions import DEFINITIONS, NAMES
from sae_lens_writesae.report import ReportFiles, write_report
from sae_lens_writesae.substitution_config import SubstitutionConfig
from sae_lens_writesae.substitution_result import METRICS, SubstitutionResult
from sae_lens_writesae.summary import Verdict


class Page(HTMLParser):
    """Text, tags and attributes of a page; unbalanced tags raise."""

    void = ("meta", "br", "path", "use", "link")

    def __init__(self, source: str):
        super().__init__()
        self.text, self.open, self.links, self.tags = "", [], [], []
        self.feed(source)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]
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
            self.text += data


@pytest.fixture(scope="module")
def pair() -> list[SubstitutionResult]:
    return [fake.fake_result(CONFOUNDED, target="state"), fake.fake_result(HOLDS, target="write", seed=1)]


@pytest.fixture(scope="module")
def summaries(pair: list[SubstitutionResult]) -> list[Any]:
    return [result.summary() for result in pair]


@pytest.fixture(scope="module")
def files(pair: list[SubstitutionResult], tmp_path_factory: pytest.TempPathFactory) -> ReportFiles:
    return write_report(pair, tmp_path_factory.mktemp("report") / "out" / "report")


@pytest.fixture(scope="module")
def page(files: ReportFiles) -> Page:
    return Page(files.html.read_text())


def squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_the_page_shows_the_summary(page: Page, summaries: list[Any]) -> None:
    text = squeezed(page.text)
    assert "substitution holds for write-trained and is confounded by a control for state-trained." in text
    for summary in summaries:
        for scale in summary.verdicts:
            row: Any = summary.rate("atom", "delete", scale)
            assert squeezed(report_text.percent(row["rate"])) in text
            assert f"clusters {report_text.span(row['boot_low'], row['boot_high'])}" in text
        assert squeezed(summary.verdicts["coefficient"].sentence) in text
    assert "confounded by state direction before the write" in text and "92.4" in text
    assert all(name in text for name in NAMES.values()) and all(words in text for words in DEFINITIONS.values())


def test_the_page_is_self_contained(page: Page, files: ReportFiles) -> None:
    source = files.html.read_text()
    assert [link for link in page.links if not link.startswith("#")] == []
    assert "script" not in page.tags and "@import" not in source and "url(http" not in source
    assert page.tags.count("svg") == 10  # five figures, two tests; one head only, so none by memory
    assert source.count("prefers-color-scheme: dark") == 1 and "@media print" in source and "viewport" in source
    assert len(source) < 400_000


def test_figures_follow_the_colours_of_the_page(files: ReportFiles) -> None:
    source = files.html.read_text()
    figures = re.findall(r"<svg.*?</svg>", source, flags=re.S)
    for figure in figures:
        ElementTree.fromstring(figure)  # well-formed
        colours = set(re.findall(r"#[0-9a-fA-F]{6}", figure))
        assert not colours, f"fixed colours {colours}"
    defined = set(re.findall(r"--([a-z]+):", source))
    assert set(re.findall(r"var\(--([a-z]+)\)", source)) <= defined
    ids = re.findall(r'<clipPath id="([^"]+)"', source)
    assert len(ids) == len(set(ids))  # a clip path of one figure must not cut another


def test_json_holds_the_same_numbers(files: ReportFiles, pair: list[SubstitutionResult], summaries: list[Any]) -> None:
    numbers = json.loads(files.json.read_text())
    assert [test["name"] for test in numbers["tests"]] == ["state-trained", "write-trained"]
    for test, result, summary in zip(numbers["tests"], pair, summaries):
        assert SubstitutionConfig(**test["info"]["config"]) == result.info.config
        wins = {(r["scale"], r["a"], r["b"]): r["rate"] for r in test["comparisons"]}
        assert wins["matched", "atom", "delete"] == summary.rate("atom", "delete", "matched")["rate"]
        assert test["verdicts"]["matched"]["outcome"] == summary.verdicts["matched"].outcome


def test_many_heads(tmp_path: Path) -> None:
    heads = [
        (HOLDS, "write", 4.0),
        (FAILS, "state", 4.0),
        (HOLDS, "write", 40.0),
        (FAILS, "state", 40.0),
        (NO_EFFECT, "write", 128.0),
    ]
    results = [
        fake.fake_result(
            m,
            target=t,
            half_life=h,
            head=i // 2,
            floor=1e-12 if m is NO_EFFECT else 0,
            n_sequences=8,
            scales=("matched",),
        )
        for i, (m, t, h) in enumerate(heads)
    ]
    page = Page(write_report(results, tmp_path / "many.html", scale="matched").html.read_text())
    text = squeezed(page.text)
    assert "substitution holds for 2, fails for 2 and is below the floor for 1 of 5 tests." in text
    assert "By the memory of the head" in text and "write-trained L1H0" in text and "at least 128 tokens" in text
    assert page.tags.count("svg") == 5 * 5 + 1


def test_one_test_with_few_conditions(tmp_path: Path) -> None:
    """One control, one scale, no last position, a single sequence (no cluster interval)."""
    few: Any = {"scales": ("coefficient",), "controls": ("state",), "n_sequences": 1, "per_sequence": 40}
    files = write_report(
        fake.fake_result(FAILS, last_position=False, **few), tmp_path / "one.html", scale="coefficient"
    )
    text = squeezed(Page(files.html.read_text()).text)
    assert "At the SAE's own coefficient, there is too little data to say" in text
    assert "random direction" not in text and json.loads(files.json.read_text())["tests"][0]["chains"] == []


def test_steps_add_two_figures(tmp_path: Path) -> None:
    result = fake.fake_result(HOLDS, n_sequences=5, scales=("matched",), controls=("state",))
    rows = [
        {
            "firing": n,
            "condition": c,
            "scale": s,
            "step": step,
            "state_gap": 0.5**step,
            "residual_cosine": 1 - 0.1**step,
        }
        for n in range(3)
        for c, s in (("native", "none"), ("delete", "none"), ("atom", "matched"), ("state", "matched"))
        for step in range(11)
    ]
    steps = pd.DataFrame(rows)
    page = Page(write_report(result, tmp_path / "steps.html", steps=[steps], scale="matched").html.read_text())
    assert "Over the next tokens" in page.text and page.tags.count("svg") == 7
    with pytest.raises(ValueError, match="each of 1 results, found 2"):
        write_report(result, tmp_path / "steps.html", steps=[steps, steps], scale="matched")


def test_names_are_escaped_and_unique(tmp_path: Path) -> None:
    few: Any = {"label": "<b>&", "n_sequences": 5, "scales": ("matched",), "controls": ("random",)}
    results = [fake.fake_result(HOLDS, **few), fake.fake_result(FAILS, **few)]
    source = write_report(results, tmp_path / "names.html", title="a < b", scale="matched").html.read_text()
    assert "&lt;b&gt;&amp; (1)" in source and "&lt;b&gt;&amp; (2)" in source and "<title>a &lt; b</title>" in source


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        write_report([], tmp_path / "x")
    with pytest.raises(ValueError, match="'unit' was not run"):
        write_report(fake.fake_result(HOLDS, n_sequences=4), tmp_path / "x", scale="unit")
    with pytest.raises(ValueError, match="'kl_last'"):
        write_report(fake.fake_result(HOLDS, n_sequences=4, last_position=False), tmp_path / "x", metric="kl_last")
    assert list(tmp_path.iterdir()) == []


def test_how_numbers_are_written() -> None:
    assert report_text.percent(0.8725) == "87.2\u00a0%"
    assert [plots.number(x) for x in (0, 1.2345, 0.0123, 3.2e-13, 12345)] == [
        "0",
        "1.23",
        "0.0123",
        "3.2·10⁻¹³",
        "1.23e+04",
    ]
    assert report_text.span(0.5, 0.625) == "50.0–62.5" and report_text.span(float("nan"), 1) == "–"
    assert report_text.p_value(0.0004) == "< 0.001" and report_text.p_value(0.04) == "0.040"


@pytest.mark.parametrize("outcome", ["holds", "fails", "confounded", "undecided", "inconclusive", "below the floor"])
def test_the_lead_of_a_single_test(outcome: Any) -> None:
    verdict = Verdict(outcome, ("state",) if outcome == "confounded" else (), "")
    assert report_text.lead([verdict], ["x"], "least_squares").startswith("At the least squares scale, ")
    assert report_text.outcome(verdict) == (
        "confounded by state direction before the write" if outcome == "confounded" else outcome
    )


def test_every_metric_and_scale_has_a_name() -> None:
    assert set(report_text.METRIC_NAMES) == set(METRICS)
    assert set(plots.SCALE_NAMES) == set(SubstitutionConfig().scales)
