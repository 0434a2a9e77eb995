"""The report in a browser: it reads well in both schemes, on a phone and on paper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import PHONE, chromium, opened, scrolls_sideways
from made_up import CONFOUNDED, FAILS, HOLDS, NO_EFFECT, made_up
from playwright.sync_api import Browser

from writesae.page.report import write_report

pytestmark = pytest.mark.slow  # a browser

EVIL = "<script>alert(1)</script>"
MADE = {"state": CONFOUNDED, "write": HOLDS, EVIL: FAILS, "silent": NO_EFFECT}


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    few: Any = {"scales": ("matched",), "controls": ("state", "shuffled"), "n_sequences": 12}
    results = [made_up(m, label=label, floor=1e-12, seed=i, **few) for i, (label, m) in enumerate(MADE.items())]
    folder: Path = tmp_path_factory.mktemp("browsed")
    return write_report(results, folder / "report.html")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


def test_claims_stand_beside_the_papers_values_and_their_controls(browser: Browser, html: Path) -> None:
    with opened(browser, html, viewport={"width": 1280, "height": 900}) as page:
        claims = page.locator("table.claims")
        first = claims.locator("tbody").first
        assert "1. an atom is nearer" in first.inner_text() and "paper: 92.4 %" in first.inner_text()
        badges = first.locator(".badge").all_inner_texts()
        assert sorted(badges) == ["below the floor", "confounded by a control", "fails", "holds"]
        assert "state before the write" in first.locator('td[data-name="controls"]').first.inner_text()
        assert EVIL in claims.inner_text() and page.locator("script").count() == 0
        assert page.locator("figure svg").count() > len(MADE)
        page.get_by_text("claims of the paper that nothing here answers").click()
        assert page.get_by_text("12. substitution on RWKV-7").is_visible()
        page.get_by_role("link", name="Can an atom stand in").click()
        assert page.url.endswith("#substitution") and not scrolls_sideways(page)


def test_a_phone_shows_every_verdict_without_scrolling_sideways(browser: Browser, html: Path) -> None:
    with opened(browser, html, **PHONE) as page:
        assert not scrolls_sideways(page)
        boxes = [badge.bounding_box() for badge in page.locator(".claims .badge").all()]
        assert boxes and all(box is not None and box["x"] + box["width"] <= 390 for box in boxes)
        assert page.locator(".scroll:has(.claims)").evaluate("e => e.scrollWidth <= e.clientWidth")


def test_paper_is_light_has_every_claim_and_leaves_out_raw_rows(browser: Browser, html: Path) -> None:
    with opened(browser, html, color_scheme="dark", viewport={"width": 680, "height": 1000}) as page:
        page.emulate_media(media="print", color_scheme="dark")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.get_by_text("12. substitution on RWKV-7").is_visible() and not scrolls_sideways(page)
        assert page.locator("details.rows").count() > 0 and not page.locator("details.rows").first.is_visible()
        assert page.locator(".claims td").first.evaluate("e => getComputedStyle(e).display") == "table-cell"
        assert page.locator(".scroll:has(.claims)").evaluate("e => e.scrollWidth <= e.clientWidth")
        assert page.pdf(format="A4").startswith(b"%PDF")
