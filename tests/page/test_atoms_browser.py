"""Pages of atoms in a real browser: they sort, filter and link, in any light, at any width, and run nothing foreign."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import pytest
from browsing import PHONE, chromium, colour, contrast, opened, scrolls_sideways
from planted_atoms import SMALL, float64_model, held_out, planted_sae
from playwright.sync_api import Browser, Page

from writesae.page.atoms import AtomPage, AtomPageFiles, AtomPagesData, write_atom_pages

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
def site(data: AtomPagesData, tmp_path_factory: pytest.TempPathFactory) -> AtomPageFiles:
    return write_atom_pages(data, tmp_path_factory.mktemp("site"))


def listed(page: Page) -> list[int]:
    """Atoms of the rows that can be seen, from top to bottom."""
    rows = page.locator("table.atoms tbody tr:visible")
    return rows.evaluate_all("rows => rows.map((row) => Number(row.dataset.atom))")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rate", lambda p: p.rate),
        ("largest", lambda p: p.max_activation),
        ("cosine", lambda p: p.cosines.at_firings.median),
        ("half-life", lambda p: p.memory.half_life or p.memory.longest),
        ("direct r", lambda p: p.effect.direct_r),
        ("beats delete", lambda p: p.substitution[0].win_rate),
    ],
)
def test_a_click_on_a_heading_sorts_and_another_turns(
    browser: Browser, data: AtomPagesData, site: AtomPageFiles, name: str, value: Callable[[AtomPage], float]
) -> None:
    with opened(browser, site.index) as page:
        assert listed(page) == sorted(site.pages)
        heading = page.get_by_role("columnheader", name=name)
        heading.get_by_role("button").click()
        assert listed(page) == [p.atom for p in sorted(data.atoms, key=lambda p: (-value(p), p.atom))]
        assert heading.get_attribute("aria-sort") == "descending"
        heading.get_by_role("button").press("Enter")
        assert listed(page) == [p.atom for p in sorted(data.atoms, key=lambda p: (value(p), p.atom))]
        assert heading.get_attribute("aria-sort") == "ascending"


def test_words_and_bounds_filter_and_the_address_keeps_them(
    browser: Browser, data: AtomPagesData, site: AtomPageFiles
) -> None:
    rates = sorted(p.rate for p in data.atoms)
    inside = [p.atom for p in sorted(data.atoms, key=lambda p: (-p.rate, p.atom)) if rates[1] <= p.rate <= rates[-2]]
    with opened(browser, site.index) as page:
        page.get_by_label("Sort by").select_option("rate")
        page.get_by_label("At least").fill(f"{100 * rates[1]}%")
        page.get_by_label("At most").fill(str(rates[-2]))
        assert listed(page) == inside and 0 < len(inside) < len(data.atoms)
        assert page.locator("#count").inner_text() == f"{len(inside)} of {len(data.atoms)} atoms"
        page.reload()
        assert listed(page) == inside and page.get_by_label("Sort by").input_value() == "rate"
        page.get_by_role("button", name="Clear").click()
        assert listed(page) == sorted(site.pages) and page.locator("#count").inner_text() == f"{len(data.atoms)} atoms"
        page.get_by_label("Search").press_sequentially(data.atoms[3].fires_on[0].text.strip().upper())
        assert 3 in listed(page) and len(listed(page)) < len(data.atoms)
        page.get_by_label("Search").fill("no-such-word")
        assert listed(page) == [] and page.locator("#count").inner_text() == f"0 of {len(data.atoms)} atoms"


def test_links_lead_through_all_atoms_and_back_to_the_choice(browser: Browser, site: AtomPageFiles) -> None:
    with opened(browser, site.index, "#sort=rate&order=asc") as page:
        order, following = listed(page), page.locator('a[rel="next"]')
        page.get_by_role("link", name=str(sorted(order)[0]), exact=True).click()
        for atom in sorted(order):
            page.wait_for_url(site.pages[atom].as_uri())
            assert page.get_by_role("heading", level=1).inner_text().startswith(f"Atom {atom} ")
            if atom < max(order):
                following.click()
        assert following.count() == 0
        page.get_by_role("link", name="All atoms").click()
        page.wait_for_url(site.index.as_uri())
        page.go_back()
        for _ in order:
            page.go_back()
        assert listed(page) == order


def test_a_page_shows_each_side_of_an_atom(browser: Browser, data: AtomPagesData, site: AtomPageFiles) -> None:
    own = data.atoms[0]
    with opened(browser, site.pages[0]) as page:
        boxed = page.locator("ol.contexts").first.locator("mark")
        assert boxed.count() == len(own.top)
        strongest = own.top[0]
        assert boxed.first.inner_text().replace("·", " ").replace("↵", "\n") == strongest.tokens[strongest.at]
        assert boxed.first.evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
        names = page.locator("h2, h3, figcaption").all_inner_texts()
        sides = ("Key side v", "Value side w", "The matrix", "What it does to the logits", "Nearest", "Firing rate by")
        for each in (*sides, "Activation density", "Read after"):
            assert any(name.startswith(each) for name in names), each
        assert page.get_by_role("row", name="layer 3, head").count() > 0  # readers
        assert page.locator("img.heat").evaluate("e => e.naturalWidth * e.naturalHeight") == 32 * 64
        boxed = page.get_by_role("heading", name="when it is read").locator("~ ol").locator("mark")
        assert own.timelines is not None and boxed.count() == len(own.timelines.firings)
        page.get_by_role("link", name=f"atom {own.nearest[0].atom}", exact=True).click()
        page.wait_for_url(site.pages[own.nearest[0].atom].as_uri())
        page.go_back()
        assert page.get_by_role("heading", name="In the place of the model's own write").count() == 1


@pytest.mark.parametrize("light", ["light", "dark"])
def test_both_schemes_can_be_read(browser: Browser, site: AtomPageFiles, light: Literal["light", "dark"]) -> None:
    for file, texts in (
        (site.index, ["h1", ".kicker", "th button", "td a", "#count", ".tok", ".ctx", "form.tools label"]),
        (site.pages[0], ["h1", "nav a", ".lead", ".contexts small", ".quality", ".side p", ".meter .n", ".chart p"]),
    ):
        with opened(browser, file, color_scheme=light) as page:
            paper = colour(page, "body", "backgroundColor")
            assert (sum(paper) / 3 > 128) == (light == "light")
            for selector in texts:
                assert contrast(colour(page, selector), paper) >= 4.5, selector


def test_pages_fit_a_phone(browser: Browser, data: AtomPagesData, site: AtomPageFiles) -> None:
    with opened(browser, site.index, **PHONE) as page:
        assert not scrolls_sideways(page)
        page.get_by_label("Sort by").select_option("cosine")
        first = data[listed(page)[0]]
        assert first.cosines is not None
        assert first.cosines.at_firings.median == max(p.cosines.at_firings.median for p in data.atoms)  # type: ignore[union-attr]
        page.get_by_role("link", name=str(first.atom), exact=True).tap()
        page.wait_for_url(site.pages[first.atom].as_uri())
        assert not scrolls_sideways(page)


def test_markup_in_the_corpus_stays_text(
    browser: Browser, data: AtomPagesData, tmp_path_factory: pytest.TempPathFactory
) -> None:
    words = ("coefficient", "random", "state", "recurrence", "attention")

    def evil(value: object) -> object:
        """The same data with every token, and every name, replaced."""
        if isinstance(value, dict):
            return {name: evil(each) for name, each in value.items()}
        if isinstance(value, list):
            return [evil(each) for each in value]
        return EVIL if isinstance(value, str) and value not in words else value

    names = {"label": EVIL, "model": EVIL, "rule": EVIL, "architecture": EVIL}
    given = {"info": data.info | names, "atoms": evil(data.model_dump()["atoms"])}
    files = write_atom_pages(AtomPagesData.model_validate(given), tmp_path_factory.mktemp("evil"))
    with opened(browser, files.index, **PHONE) as page:
        assert page.locator("img").count() == 0 and page.locator("script").count() == 1
        assert EVIL in page.get_by_role("heading", level=1).inner_text()
        assert EVIL in page.locator(".tok").first.inner_text().replace("·", " ") and not scrolls_sideways(page)
        page.get_by_label("Search").fill('<script>alert("token")')
        assert listed(page) == sorted(files.pages)
    with opened(browser, files.pages[0], **PHONE) as page:
        assert page.locator("img:not(.heat), script").count() == 0 and not scrolls_sideways(page)
        assert page.locator("mark").first.inner_text().replace("·", " ") == EVIL


def test_what_was_not_measured_is_a_dash_and_sorts_last(
    browser: Browser, data: AtomPagesData, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bare = {"cosines": None, "effect": None, "readers": None, "substitution": None}
    atoms = [data.atoms[0].model_copy(update=bare), *data.atoms[1:]]
    files = write_atom_pages(AtomPagesData(info=data.info, atoms=atoms), tmp_path_factory.mktemp("bare"))
    with opened(browser, files.index) as page:
        for name in ("cosine", "direct r", "beats delete"):
            for _ in range(2):
                page.get_by_role("columnheader", name=name).get_by_role("button").click()
                assert listed(page)[-1] == 0
            assert page.locator(f'tr[data-atom="0"] td[data-name="{name}"]').inner_text() == "–"
    with opened(browser, files.pages[0]) as page:
        text = page.locator("main").inner_text()
        assert "Who reads it" not in text and "the model's own write" not in text and "nan" not in text.lower()
