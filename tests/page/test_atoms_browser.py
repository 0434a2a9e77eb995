"""Pages of atoms in a real browser: they sort, filter and link, in any light, at any width, and run nothing foreign."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from browsing import PHONE, opened, scrolls_sideways
from planted_atoms import SMALL, held_out, planted_sae
from playwright.sync_api import Browser, Page

from hookpoints import HookedRecurrent
from writesae.page.atoms import AtomPage, AtomPagesData, write_atom_pages

pytestmark = pytest.mark.slow  # a browser

EVIL = '</td><script>alert("token")</script><img src=x onerror=alert(1)>&amp;' + "long" * 40
"""What a corpus may hold: markup, and words without a place to break."""


@pytest.fixture(scope="module")
def data(embedded: HookedRecurrent) -> AtomPagesData:
    tokens = held_out(embedded)
    return SMALL.collect(embedded, planted_sae(embedded, tokens), tokens, progress=False)


@pytest.fixture(scope="module")
def index(data: AtomPagesData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_atom_pages(data, tmp_path_factory.mktemp("site"))


def listed(page: Page) -> list[int]:
    """Atoms of the rows that can be seen, from top to bottom."""
    rows = page.locator("table.atoms tbody tr:visible")
    return rows.evaluate_all("rows => rows.map((row) => Number(row.dataset.atom))")


ATOMS = list(range(6))
COLUMNS: dict[str, Callable[[AtomPage], float | None]] = {
    "rate": lambda p: p.rate,
    "largest": lambda p: p.max_activation,
    "cosine": lambda p: p.cosines and p.cosines.median,
    "half-life": lambda p: p.memory.half_life or p.memory.longest,
    "direct r": lambda p: p.effect and p.effect.direct_r,
}


def test_a_click_on_a_heading_sorts_and_another_turns(browser: Browser, data: AtomPagesData, index: Path) -> None:
    with opened(browser, index) as page:
        assert listed(page) == ATOMS
        for name, value in COLUMNS.items():
            heading = page.get_by_role("columnheader", name=name)
            for sign, order in ((-1, "descending"), (1, "ascending")):
                heading.get_by_role("button").click()
                assert listed(page) == sorted(ATOMS, key=lambda n: (sign * (value(data.atoms[n]) or 0), n))
                assert heading.get_attribute("aria-sort") == order


def test_words_and_bounds_filter_and_the_address_keeps_them(browser: Browser, data: AtomPagesData, index: Path) -> None:
    rates = sorted(p.rate for p in data.atoms)
    inside = [p.atom for p in sorted(data.atoms, key=lambda p: (-p.rate, p.atom)) if rates[1] <= p.rate <= rates[-2]]
    with opened(browser, index) as page:
        page.get_by_label("Sort by").select_option("rate")
        page.get_by_label("At least").fill(f"{100 * rates[1]}%")
        page.get_by_label("At most").fill(str(rates[-2]))
        assert listed(page) == inside and 0 < len(inside) < len(data.atoms)
        assert page.locator("#count").inner_text() == f"{len(inside)} of {len(data.atoms)} atoms"
        page.reload()
        assert listed(page) == inside and page.get_by_label("Sort by").input_value() == "rate"
        page.get_by_role("button", name="Clear").click()
        assert listed(page) == ATOMS and page.locator("#count").inner_text() == f"{len(data.atoms)} atoms"
        page.get_by_label("Search").press_sequentially(data.atoms[3].fires_on[0].text.strip().upper())
        assert 3 in listed(page) and len(listed(page)) < len(data.atoms)
        page.get_by_label("Search").fill("no-such-word")
        assert listed(page) == [] and page.locator("#count").inner_text() == f"0 of {len(data.atoms)} atoms"


def evil(value: Any) -> Any:
    """The same data with every token, and every name, replaced."""
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{each.name: evil(getattr(value, each.name)) for each in fields(value)})
    if isinstance(value, list):
        return [evil(each) for each in value]
    return EVIL if isinstance(value, str) else value


def test_markup_in_the_corpus_stays_text(browser: Browser, data: AtomPagesData, tmp_path: Path) -> None:
    info = data.info | dict.fromkeys(("label", "model", "rule", "architecture"), EVIL)
    index = write_atom_pages(AtomPagesData(info, evil(data.atoms)), tmp_path)
    with opened(browser, index, **PHONE) as page:
        assert page.locator("img").count() == 0 and page.locator("script").count() == 1
        assert EVIL in page.get_by_role("heading", level=1).inner_text()
        assert EVIL in page.locator(".tok").first.inner_text().replace("·", " ") and not scrolls_sideways(page)
        page.get_by_label("Search").fill('<script>alert("token")')
        assert listed(page) == ATOMS
    with opened(browser, tmp_path / "atom-0.html", **PHONE) as page:
        assert page.locator("img:not(.heat), script").count() == 0 and not scrolls_sideways(page)
        assert page.locator("mark").first.inner_text().replace("·", " ") == EVIL


def test_what_was_not_measured_is_a_dash_and_sorts_last(browser: Browser, data: AtomPagesData, tmp_path: Path) -> None:
    atoms = [replace(data.atoms[0], cosines=None, effect=None), *data.atoms[1:]]
    with opened(browser, write_atom_pages(AtomPagesData(data.info, atoms), tmp_path)) as page:
        for name in ("cosine", "direct r"):
            for _ in range(2):
                page.get_by_role("columnheader", name=name).get_by_role("button").click()
                assert listed(page)[-1] == 0
            assert page.locator(f'tr[data-atom="0"] td[data-name="{name}"]').inner_text() == "–"
    with opened(browser, tmp_path / "atom-0.html") as page:
        assert "nan" not in page.locator("main").inner_text().lower()
