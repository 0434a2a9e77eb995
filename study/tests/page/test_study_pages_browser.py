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

from writesae.page.template import environment
from writesae_study.page.report import write_report

pytestmark = pytest.mark.slow  # a browser

ZOO: Any = {
    "settings": {"models": ["recall"], "seeds": 1},
    "readings": [],
    "boards": [
        {
            "model": "recall",
            "rows": [
                {"method": EVIL, "parameters": 5120, "bits": 28.6, "changed": {"mean": 1.0, "low": 0.9, "high": 1}}
            ],
            "plain": {"answered": 1.0},
            "attribution": {"writes found": 0.5, "null": 0.1},
            "states": [{"pairs": 3, "found": 0.5}],
        }
    ],
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where each page is, with texts that look like markup."""
    folder: Path = tmp_path_factory.mktemp("pages")
    few: Any = {"scales": ("matched",), "controls": ("state", "shuffled"), "n_sequences": 12}
    medians = {"held": HOLDS, EVIL: FAILS, "worse": {"delete": 1.0, "atom": 1e7, "state": 1e9}, "state": CONFOUNDED}
    results = [made_up(m, label=label, floor=1e-12, seed=i, **few) for i, (label, m) in enumerate(medians.items())]
    (folder / "zoo.html").write_text(environment("writesae_study").get_template("zoo.html").render(ZOO))
    return {"report": write_report(results, folder / "report.html"), "zoo": folder / "zoo.html"}


@pytest.fixture(params=["report", "zoo"])
def place(request: pytest.FixtureRequest, places: dict[str, Path]) -> Path:
    """Each page in turn."""
    return places[request.param]


@pytest.mark.parametrize(("scheme", "first", "other"), [("light", LIGHT, DARK), ("dark", DARK, LIGHT)])
def test_colors(browser: Browser, place: Path, scheme: str, first: str, other: str) -> None:
    assert_colors(browser, place, scheme, first, other)


def test_a_phone(browser: Browser, place: Path) -> None:
    assert_fits_a_phone(browser, place)


def test_paper(browser: Browser, place: Path) -> None:
    assert_prints(browser, place)


def test_the_keyboard(browser: Browser, place: Path) -> None:
    assert_keyboard(browser, place)


@pytest.mark.parametrize(("name", "where"), [("report", "td b"), ("zoo", "td")])
def test_markup(browser: Browser, places: dict[str, Path], name: str, where: str) -> None:
    assert_no_markup(browser, places[name], where)
