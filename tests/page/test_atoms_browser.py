"""Pages of atoms in a real browser: they sort, filter and link, in any light, at any width, and run nothing foreign."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from browsing import PHONE, chromium, opened, scrolls_sideways
from planted_atoms import SMALL, float64_model, held_out, planted_sae
from playwright.sync_api import Browser, Page

from writesae.page.atoms import AtomPage, AtomPagesData, write_atom_pages

pytestmark = pytest.mark.slow  # a browser

EVIL = '</td><script>alert("token")</script><img src=x onerror=alert(1)>&amp;' + "long" * 40
"""What a corpus may hold: markup, and words without a place to break."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def data(browser: Browser) -> AtomPagesData:
    model = float64_model()
    tokens = held_out(model)
    return SMALL.collect(model, planted_sae(model, tokens), tokens, progress=False)


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


def test_links_lead_through_all_atoms_and_back_to_the_choice(browser: Browser, index: Path) -> None:
    with opened(browser, index, "#sort=rate&order=asc") as page:
        order, following = listed(page), page.locator('a[rel="next"]')
        page.get_by_role("link", name="0", exact=True).click()
        for atom in ATOMS:
            page.wait_for_url(index.with_name(f"atom-{atom}.html").as_uri())
            assert page.get_by_role("heading", level=1).inner_text().startswith(f"Atom {atom} ")
            if atom < max(ATOMS):
                following.click()
        assert following.count() == 0
        for _ in ATOMS:
            page.go_back()
        assert listed(page) == order
        page.get_by_role("link", name="2", exact=True).click()
        page.get_by_role("link", name="All atoms").click()
        page.wait_for_url(index.as_uri())


def test_a_page_shows_each_side_of_an_atom(browser: Browser, data: AtomPagesData, index: Path) -> None:
    own = data.atoms[0]
    with opened(browser, index.with_name("atom-0.html")) as page:
        boxed = page.locator("ol.contexts").first.locator("mark")
        strongest = own.top[0]
        assert boxed.count() == len(own.top)
        assert boxed.first.inner_text().replace("·", " ").replace("↵", "\n") == strongest.tokens[strongest.at]
        names = "\n".join(page.locator("h2, h3, figcaption").all_inner_texts())
        sides = ("Key side v", "Value side w", "The matrix", "What it does to the logits", "Firings by")
        assert all(each in names for each in (*sides, "Activation density", "Read after"))
        assert page.locator("img.heat").evaluate("e => e.naturalWidth * e.naturalHeight") == 32 * 64
        boxed = page.get_by_role("heading", name="when it is read").locator("~ ol").locator("mark")
        assert boxed.count() == len(own.timelines) > 0


def test_pages_fit_a_phone(browser: Browser, data: AtomPagesData, index: Path) -> None:
    with opened(browser, index, **PHONE) as page:
        assert not scrolls_sideways(page)
        page.get_by_label("Sort by").select_option("cosine")
        first = max(data.atoms, key=lambda each: each.cosines.median if each.cosines else -1)
        assert listed(page)[0] == first.atom
        page.get_by_role("link", name=str(first.atom), exact=True).tap()
        page.wait_for_url(index.with_name(f"atom-{first.atom}.html").as_uri())
        assert not scrolls_sideways(page)


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
