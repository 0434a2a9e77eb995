"""One page over all evaluations: its numbers are theirs, and it reads well in a browser, on a phone and on paper."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from browsing import PHONE, chromium, colour, contrast, opened, scrolls_sideways
from fake_substitution import CONFOUNDED, FAILS, HOLDS, NO_EFFECT, fake_result
from playwright.sync_api import Browser

from sae_lens_writesae.evaluation import Claim, Evaluation, Figure
from sae_lens_writesae.joined_report import Paragraph, _paragraphs, find_results, write_joined_report
from sae_lens_writesae.report import ReportFiles
from sae_lens_writesae.substitution_evaluation import Substitution
from sae_lens_writesae.verdict.paper import PAPER_CLAIMS

EVIL = "<script>alert(1)</script>"
MADE = {"state": CONFOUNDED, "write": HOLDS, EVIL: FAILS, "silent": NO_EFFECT}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of results, as `writesae eval` and `writesae reproduce` leave them."""
    folder = tmp_path_factory.mktemp("results")
    for i, (label, medians) in enumerate(MADE.items()):
        target = "state" if label == "state" else "write"
        result = fake_result(medians, label=label, target=target, floor=1e-12, seed=i)
        Substitution.of(result).save(folder / str(i) / "substitution")
    Substitution.of(fake_result(FAILS)).save(folder / ".unfinished")
    return folder


@pytest.fixture(scope="module")
def files(saved: Path) -> ReportFiles:
    return write_joined_report(find_results([saved]), saved / "report" / "report.html")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


def test_every_answer_is_on_the_page_in_json_and_in_csv(saved: Path, files: ReportFiles) -> None:
    results = find_results([saved])
    assert len(results) == len(MADE) and results[0].info["target"] == "write"  # written targets first
    answers = {(result.label, claim.claim): claim for result in results for claim in result.claims()}
    numbers = json.loads(files.json.read_text())
    assert {(row["label"], row["claim"]) for row in numbers["claims"]} >= answers.keys()
    for row in numbers["claims"]:
        own = answers.get((row["label"], row["claim"]))
        assert own is None or (row["measured"], row["n"], row["outcome"]) == (own.measured, own.n, own.outcome)
        assert row["number"] is None or row["paper"] == PAPER_CLAIMS[row["number"]].value
    table = pd.read_csv(files.html.with_name("claims.csv"))
    assert table["measured"].tolist() == [row["measured"] for row in numbers["claims"]]
    firings = pd.read_parquet(files.html.parent / "tables" / "substitution-firings.parquet")
    assert set(firings["label"]) == set(MADE) and len(firings) == sum(len(r.tables["firings"]) for r in results)


def test_folders_without_results_are_named(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no evaluation was saved in or below .* \(looked for info.json\)"):
        find_results([tmp_path])
    (tmp_path / "info.json").write_text(json.dumps({"format": 1, "kind": "guess", "tables": [], "info": {}}))
    with pytest.raises(ValueError, match="holds an evaluation 'guess'; known here: substitution, "):
        find_results([tmp_path])
    with pytest.raises(ValueError, match="at least one evaluation"):
        write_joined_report([], tmp_path / "page")


def test_a_list_in_a_description_stays_a_list() -> None:
    class Listed(Evaluation):
        """What is asked, of
        `tokens`.

        Verdicts:

        * "holds": if it
          does;
        * "fails": otherwise.

        In this order:
        1. the floor,
        2. chance.

        That is all."""

        def claims(self) -> list[Claim]:
            return []

        def figures(self) -> list[Figure]:
            return []

    assert _paragraphs(Listed) == [
        Paragraph("What is asked, of tokens.", []),
        Paragraph("Verdicts:", ['"holds": if it does;', '"fails": otherwise.']),
        Paragraph("In this order:", ["the floor,", "chance."], numbered=True),
        Paragraph("That is all.", []),
    ]


def test_claims_stand_beside_the_papers_values_and_their_controls(browser: Browser, files: ReportFiles) -> None:
    with opened(browser, files.html, viewport={"width": 1280, "height": 900}) as page:
        claims = page.locator("table.claims")
        first = claims.locator("tbody").first
        assert "1. an atom is nearer" in first.inner_text() and "paper: 92.4 %" in first.inner_text()
        badges = first.locator(".badge").all_inner_texts()
        assert sorted(badges) == ["below the floor", "confounded", "fails", "holds"]
        assert "state direction" in first.locator('td[data-name="controls"]').first.inner_text()
        assert EVIL in claims.inner_text() and page.locator("script").count() == 0
        assert page.locator("figure svg").count() > len(MADE)
        unanswered = page.get_by_text("claims of the paper that nothing here answers")
        unanswered.click()
        assert page.get_by_text(
            "12. substitution on RWKV-7 (needs the evaluation substitution on an RWKV-7 model)"
        ).is_visible()
        page.get_by_role("link", name="Can an atom stand in").click()
        assert page.url.endswith("#substitution") and not scrolls_sideways(page)


@pytest.mark.parametrize("light", ["light", "dark"])
def test_both_schemes_can_be_read(browser: Browser, files: ReportFiles, light: Any) -> None:
    with opened(browser, files.html, color_scheme=light) as page:
        paper = colour(page, "body", "backgroundColor")
        assert (sum(paper) / 3 > 128) == (light == "light")
        for selector in ("h1", ".lead", ".holds", ".fails", ".confounded", ".below", "td small", "nav a", ".muted"):
            assert contrast(colour(page, selector), paper) >= 4.5, selector


def test_a_phone_shows_every_verdict_without_scrolling_sideways(browser: Browser, files: ReportFiles) -> None:
    with opened(browser, files.html, **PHONE) as page:
        assert not scrolls_sideways(page)
        boxes = [badge.bounding_box() for badge in page.locator(".claims .badge").all()]
        assert boxes and all(box is not None and box["x"] + box["width"] <= 390 for box in boxes)
        assert page.locator(".scroll:has(.claims)").evaluate("e => e.scrollWidth <= e.clientWidth")


def test_paper_is_light_has_every_claim_and_leaves_out_raw_rows(browser: Browser, files: ReportFiles) -> None:
    with opened(browser, files.html, color_scheme="dark", viewport={"width": 680, "height": 1000}) as page:
        page.emulate_media(media="print", color_scheme="dark")
        assert colour(page, "body", "backgroundColor") == (255, 255, 255)
        assert page.get_by_text("12. substitution on RWKV-7").is_visible() and not scrolls_sideways(page)
        assert page.locator("details.rows").count() > 0 and not page.locator("details.rows").first.is_visible()
        assert page.locator(".claims td").first.evaluate("e => getComputedStyle(e).display") == "table-cell"
        assert page.locator(".scroll:has(.claims)").evaluate("e => e.scrollWidth <= e.clientWidth")
        assert page.pdf(format="A4").startswith(b"%PDF")
