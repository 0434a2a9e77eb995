"""The report in a browser: it reads well in both schemes, on a phone and on paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from browsing import PHONE, opened, scrolls_sideways
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
        assert page.locator(".claims tbody tr").count() > 1 and not scrolls_sideways(page)
        assert page.locator("details.rows").count() > 0 and not page.locator("details.rows").first.is_visible()
        assert page.locator(".claims td").first.evaluate("e => getComputedStyle(e).display") == "table-cell"
        assert page.locator(".scroll:has(.claims)").evaluate("e => e.scrollWidth <= e.clientWidth")
        assert page.pdf(format="A4").startswith(b"%PDF")
