"""Every page in a real browser: light and dark, on a phone, on paper, by keyboard; and that no text becomes markup."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from browsing import PHONE, opened, scrolls_sideways
from playwright.sync_api import Browser, Page, expect

from writesae.demo import ChosenHead, Recalled, RecalledMemory, page_of
from writesae.page.atoms import AtomPagesData, write_atom_pages
from writesae.page.prompt import PromptServer

pytestmark = pytest.mark.slow  # a browser

EVIL = '</td><script>alert("token")</script><img src=x onerror=alert(1)>&amp;' + "long" * 40
"""What a corpus may hold: markup, and words without a place to break."""
LIGHT, DARK = "rgb(255, 255, 255)", "rgb(20, 23, 28)"
CONTROLS = ":is(a[href], button, input, select, textarea, summary, [tabindex='0']):visible"
REACHED = """(() => {
    const at = document.activeElement, { outlineStyle, outlineWidth } = getComputedStyle(at);
    at.dataset.reached = "";
    return at === document.body || (outlineStyle !== "none" && parseFloat(outlineWidth) > 0);
})()"""
"""Marks what has the focus; whether that can be seen."""
BACKGROUNDS = "parts => parts.map((part) => getComputedStyle(part).backgroundColor)"
QUALITY: Any = {
    "recovered": {"mean": 0.5, "low": 0.4, "high": 0.6},
    "deleted": {"mean": 1.0, "low": 0.9, "high": 1.1},
    "explained": 0.5,
    "l0": 1.0,
    "alive": 1.0,
    "cosine": 0.7,
}


def everywhere(value: Any, text: str = EVIL) -> Any:
    """The same data with every token, and every name, replaced."""
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{each.name: everywhere(getattr(value, each.name)) for each in fields(value)})
    if isinstance(value, list):
        return [everywhere(each) for each in value]
    return text if isinstance(value, str) else value


@pytest.fixture(scope="module")
def places(data: AtomPagesData, server: PromptServer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Where each page is, all of them with texts that look like markup."""
    folder: Path = tmp_path_factory.mktemp("pages")
    info = data.info | dict.fromkeys(("label", "model", "rule", "architecture"), EVIL)
    index = write_atom_pages(AtomPagesData(info, everywhere(data.atoms)), folder)
    memory = RecalledMemory(EVIL, [{"text": EVIL, "score": 1.0, "span": None}], EVIL, 0.5)
    demo = Recalled({EVIL: (EVIL, 0.5)}, EVIL, EVIL, [memory, memory], EVIL, {"read": 1.0}, "<svg></svg>")
    (folder / "demo.html").write_text(page_of(demo, ChosenHead(EVIL, EVIL, 2, 1, 20.0, 0.1), {EVIL: QUALITY}))
    return {
        "demo": folder / "demo.html",
        "index": index,
        "atom": folder / "atom-0.html",
        "prompt": address(server),
    }


def background(page: Page) -> str:
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


@pytest.mark.parametrize(("name", "where"), [("demo", "td b"), ("index", "h1"), ("atom", "mark"), ("prompt", "")])
def test_a_page_is_read_on_any_screen_on_paper_and_by_keyboard(
    browser: Browser, places: dict[str, Any], name: str, where: str
) -> None:
    if name == "index":  # the others share its theme
        assert_colors(browser, places[name], "dark", DARK, LIGHT)
    assert_fits_a_phone(browser, places[name])
    assert_prints(browser, places[name])
    assert_keyboard(browser, places[name])
    if where:
        assert_no_markup(browser, places[name], where)


def assert_colors(browser: Browser, place: Any, scheme: Any, first: str, other: str) -> None:
    """They follow the system until the button says otherwise."""
    with opened(browser, place, color_scheme=scheme) as page:
        assert background(page) == first
        page.get_by_role("button", name="Light" if first == DARK else "Dark", exact=True).click()
        assert background(page) == other
        page.add_init_script(f"localStorage.theme = '{page.evaluate('localStorage.theme')}'")  # as another page would
        page.reload()
        assert background(page) == other
        assert page.locator("#theme").inner_text() == ("Light" if other == DARK else "Dark")


def assert_fits_a_phone(browser: Browser, place: Any) -> None:
    """Without scrolling sideways."""
    with opened(browser, place, **PHONE) as page:
        page.locator("details").evaluate_all("all => all.forEach((each) => { each.open = true })")
        assert not scrolls_sideways(page)
        assert page.locator(".scroll:has(.stack)").evaluate_all(
            "all => all.every((e) => e.scrollWidth <= e.clientWidth)"
        )


def assert_prints(browser: Browser, place: Any) -> None:
    """Light, with what is folded."""
    with opened(browser, place, color_scheme="dark", viewport={"width": 680, "height": 1000}) as page:
        page.emulate_media(media="print", color_scheme="dark")
        assert background(page) == LIGHT and not scrolls_sideways(page)
        assert page.locator(".scroll:visible").evaluate_all("all => all.every((e) => e.scrollWidth <= e.clientWidth)")
        for folded in page.locator("details:not([open], .raw, .raw *) > :not(summary, .raw)").all():
            assert folded.evaluate("e => e.checkVisibility({ contentVisibilityAuto: true }) && e.offsetHeight > 0")
        assert not page.locator("header, form, details.raw").locator("visible=true").count()
        assert page.pdf(format="A4").startswith(b"%PDF")


def assert_keyboard(browser: Browser, place: Any) -> None:
    """It reaches every control, and shows where it is."""
    with opened(browser, place) as page:
        page.locator("#sources li, body:not(:has(#sources))").first.wait_for()
        controls = page.locator(CONTROLS)
        for _ in range(2 * controls.count()):
            page.keyboard.press("Tab")
            assert page.evaluate(REACHED)
        assert controls.evaluate_all("all => all.every((each) => 'reached' in each.dataset)")


def assert_no_markup(browser: Browser, place: Path, where: str) -> None:
    """Text of a corpus stays text, somewhere on the page."""
    with opened(browser, place) as page:
        assert page.locator("img:not(.heat)").count() == 0 and page.locator("script").count() == 1
        assert any(EVIL in shown.replace("·", " ") for shown in page.locator(where).all_inner_texts())


def address(server: PromptServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def test_a_prompt_is_read_and_stays_text(browser: Browser, server: PromptServer) -> None:
    with opened(browser, address(server), **PHONE) as page:
        page.locator("#acts, #atoms li").first.wait_for()
        page.get_by_label("Text").fill(EVIL[5:-160])
        page.get_by_role("button", name="Read", exact=True).click()
        shown = page.locator("#text")
        shown.get_by_text("onerror").or_(shown.get_by_text("script")).first.wait_for()
        assert EVIL[5:-160] in shown.inner_text().replace("\n", "").replace("·", " ")
        assert page.locator("img").count() == 0 and page.locator("script").count() == 1
        shown.get_by_role("button").nth(3).click()
        expect(page.locator("#atoms li")).to_have_count(1)


def test_a_sentence_or_a_phrase_is_cut_replaced_and_restored(browser: Browser, speaker: PromptServer) -> None:
    """The question is asked again each time; the reader's score of the sentence follows."""
    with opened(browser, address(speaker), **PHONE) as page:
        sentence = page.locator("#acts li").filter(has_text="The home of Clara is Vienna.")
        verdict, after, kl = page.locator("#said"), page.locator("#after"), page.locator("#kl")
        sentence.get_by_text("this sentence overwrote another answer").wait_for()
        assert after.inner_text() == page.locator("#before").inner_text() == "Vienna."
        sentence.get_by_role("button", name="Cut").click()
        verdict.get_by_text("The model now says “Paris.”; it said “Vienna.”.").wait_for()
        assert after.inner_text() == "Paris." and page.locator("#after-tokens li").count() == 5
        assert kl.inner_text().startswith("KL divergence of the next sentence: 11.66")
        assert page.evaluate("document.activeElement.textContent") == "Restore"
        page.get_by_role("button", name="Score the phrases").click()
        sentence.get_by_text("Reader: read").wait_for()
        read, cut, never = map(float, re.findall(r"-?\d+\.\d\d", sentence.inner_text().split("Reader")[1]))
        assert read > 5 and abs(cut - never) < 0.1 < read - cut
        sentence.get_by_role("button", name="Restore").click()
        verdict.get_by_text("The model still says “Vienna.”").wait_for()
        assert kl.inner_text() == "Nothing is changed yet."
        sentence.get_by_role("textbox").fill("The city where Clara lives is Rome.")
        sentence.get_by_role("button", name="Replace").click()
        verdict.get_by_text("The model now says “Rome.”; it said “Vienna.”.").wait_for()
        assert page.locator("#text .told").count() == 7
        page.get_by_role("button", name="Restore all").click()
        verdict.get_by_text("The model still says “Vienna.”").wait_for()
        # A phrase of the text is marked, taken and cut.
        tokens = page.locator("#text button")
        vienna = tokens.all_inner_texts().index("·Vienna")
        tokens.nth(vienna - 1).click()
        tokens.nth(vienna).click()
        page.get_by_role("button", name="Take the marked phrase").click()
        page.locator("#acts li").first.get_by_role("button", name="Cut is Vienna").click()
        page.locator("#text .cut").first.wait_for()
        assert page.locator("#text .cut").all_inner_texts() == ["·is", "·Vienna"]
        sentence.get_by_role("button", name="Cut").click()
        page.get_by_text("shares tokens with “is Vienna”").wait_for()
        assert not scrolls_sideways(page)


def cut_of(page: Page, sentence: str) -> None:
    page.locator("#acts li").filter(has_text=sentence).get_by_role("button", name="Cut").click()
    page.locator("#acts .cut").filter(has_text=sentence).wait_for()


def ask_anew(page: Page, question: str) -> str:
    page.get_by_label("Question, or").fill(question)
    page.get_by_role("button", name="Read", exact=True).click()
    expect(page.locator("#typed")).to_be_hidden()
    page.locator("#said").get_by_text("tokens of text").wait_for()
    return page.locator("#said").inner_text()


VIENNA = "The home of Clara is Vienna."


def test_changes_outlive_another_question_and_a_reload(browser: Browser, speaker: PromptServer) -> None:
    with opened(browser, address(speaker)) as page:
        after, cut, typed = page.locator("#after"), page.locator("#acts .cut"), page.locator("#typed")
        cut_of(page, VIENNA)
        assert ask_anew(page, "Where is the home of Clara?").endswith("1 of your changes stay")
        assert cut.count() == 1 and after.inner_text() == "Paris." and page.locator("#text .cut").count() == 7
        page.reload()
        cut.filter(has_text=VIENNA).wait_for()
        assert page.get_by_label("Question, or").input_value() == "Where is the home of Clara?"
        assert after.inner_text() == "Paris." and page.locator("#before").inner_text() == "Vienna."
        # A text that is not read yet has no part in what is below.
        page.get_by_label("Text that").fill("Boris lives in Rome. We are at peace.")
        assert typed.is_visible() and cut.count() == 1
        verdict = ask_anew(page, "Where does Boris live?")
        assert verdict.endswith("the text is another one, so 1 of your changes are gone")
        assert not cut.count() and not typed.is_visible() and after.inner_text() == "Rome."


def test_why_names_what_made_the_answer_before_changes(browser: Browser, speaker: PromptServer) -> None:
    with opened(browser, address(speaker), **PHONE) as page:
        note, answer = page.locator("#as-read"), page.locator("#answer")
        cut_of(page, VIENNA)
        assert note.is_visible()
        page.get_by_role("button", name="Why this answer?").click()
        answer.get_by_text("of the text as it was read, before your changes.").wait_for()
        assert "Vienna" in answer.inner_text()
        page.get_by_role("button", name=re.compile(r"^L\d+H\d+@\d+:")).first.press("Enter")
        page.locator("#port-value li").first.wait_for()
        assert page.locator("#node").inner_text().startswith("write of L") and not scrolls_sideways(page)
        for _ in range(2):
            page.locator("#theme").click()
            assert len({*page.locator("#picture, #picture svg").evaluate_all(BACKGROUNDS)}) == 1
        page.get_by_role("button", name="Restore all").click()
        page.locator("#said").get_by_text("still says").wait_for()
        assert not note.is_visible()


def listed(page: Page) -> list[int]:
    """Atoms of the rows that can be seen, from top to bottom."""
    rows = page.locator("table.atoms tbody tr:visible")
    return rows.evaluate_all("rows => rows.map((row) => Number(row.dataset.atom))")


ATOMS = list(range(6))


def test_a_click_on_a_heading_sorts_and_another_turns(browser: Browser, data: AtomPagesData, site: Path) -> None:
    """What was not measured is a dash, and comes last either way."""
    values = [atom.cosine if atom.atom else None for atom in data.atoms]
    with opened(browser, site / "index.html") as page:
        heading = page.get_by_role("columnheader", name="cosine")
        for sign, order in ((-1, "descending"), (1, "ascending")):
            heading.get_by_role("button").click()
            assert listed(page) == sorted(ATOMS, key=lambda n: (values[n] is None, sign * (values[n] or 0), n))
            assert heading.get_attribute("aria-sort") == order
        assert page.locator('td[data-name="cosine"]').get_by_text("–", exact=True).count() == 1


def test_words_and_bounds_filter_and_the_address_saves_them(browser: Browser, data: AtomPagesData, site: Path) -> None:
    rates = {page.atom: page.rate for page in data.atoms}
    _, low, *_, high, _ = sorted(rates.values())
    inside = [atom for atom in sorted(rates, key=lambda atom: (-rates[atom], atom)) if low <= rates[atom] <= high]
    with opened(browser, site / "index.html") as page:
        page.get_by_label("Sort by").select_option("rate")
        page.get_by_label("At least").fill(f"{100 * low}%")
        page.get_by_label("At most").fill(str(high))
        assert listed(page) == inside and 0 < len(inside) < len(ATOMS)
        page.reload()
        assert listed(page) == inside
        page.get_by_role("button", name="Clear").click()
        assert listed(page) == ATOMS and page.locator("#count").inner_text() == f"{len(ATOMS)} atoms"
        page.get_by_label("Search").press_sequentially(data.atoms[3].fires_on[0].text.strip().upper())
        assert 3 in listed(page) and len(listed(page)) < len(ATOMS)
