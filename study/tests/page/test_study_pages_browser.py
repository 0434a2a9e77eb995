"""The pages of the study in a real browser, as those of the product are seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_up import CONFOUNDED, FAILS, HOLDS, made_up
from page.test_pages_browser import (
    DARK,
    EVIL,
    LIGHT,
    assert_colors,
    assert_fits_a_phone,
    assert_keyboard,
    assert_no_markup,
    assert_prints,
)
from playwright.sync_api import Browser

from writesae_study.page.report import write_report

pytestmark = pytest.mark.slow  # a browser


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with texts that look like markup."""
    few: Any = {"scales": ("matched",), "controls": ("state", "shuffled"), "n_sequences": 12}
    medians = {"held": HOLDS, EVIL: FAILS, "worse": {"delete": 1.0, "atom": 1e7, "state": 1e9}, "state": CONFOUNDED}
    results = [made_up(m, label=label, floor=1e-12, seed=i, **few) for i, (label, m) in enumerate(medians.items())]
    return write_report(results, tmp_path_factory.mktemp("pages") / "report.html")


@pytest.mark.parametrize(("scheme", "first", "other"), [("light", LIGHT, DARK), ("dark", DARK, LIGHT)])
def test_colors(browser: Browser, place: Path, scheme: str, first: str, other: str) -> None:
    assert_colors(browser, place, scheme, first, other)


def test_a_phone(browser: Browser, place: Path) -> None:
    assert_fits_a_phone(browser, place)


def test_paper(browser: Browser, place: Path) -> None:
    assert_prints(browser, place)


def test_the_keyboard(browser: Browser, place: Path) -> None:
    assert_keyboard(browser, place)


def test_markup(browser: Browser, place: Path) -> None:
    assert_no_markup(browser, place, "td b")
