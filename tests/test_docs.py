"""The documentation covers every public name, hook and error; its links lead somewhere, and its Python runs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.append(str(ROOT / "tools"))

import pictures  # noqa: E402
import reference  # noqa: E402
import tables  # noqa: E402
from examples import fresh_start, printed  # noqa: E402
from test_readme import assert_comments_hold  # noqa: E402

from sae_lens_writesae.sae import TRAINING  # noqa: E402

PACKAGES = ("hookpoints", "sae_lens_writesae")
PAGES = sorted(DOCS.glob("*.md"))
LINKED = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *ROOT.glob("tutorials/*.ipynb")]
BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
WRITTEN = [page for page in PAGES if BLOCK.search(page.read_text())]
WRITTEN.remove(DOCS / "your_model.md")  # it needs a checkpoint: test_your_model.py
LONG = ("reading", "zoo")
"""Pages that run at night: each takes ten seconds or more."""


def test_all_of_hookpoints_has_every_public_name_as_the_code_has_it_now():
    """`python tools/reference.py` writes the page and the table of hooks."""
    page, hooks = (DOCS / name for name in ("reference.md", "hooks.md"))
    assert page.read_text() == reference.reference()
    assert hooks.read_text() == reference.hooks_page(hooks.read_text())
    shown = set(re.findall(r"^\* \*\*`(\w+)", page.read_text(), re.MULTILINE))
    assert shown == {name for package in reference.PACKAGES for name in package.__all__}
    assert "    * `.without(span, *, approximate=False)` " in page.read_text()


def test_every_error_has_a_section():
    sections = re.findall(r"^### `(\w+)`$", (DOCS / "errors.md").read_text(), flags=re.MULTILINE)
    code = "\n".join(file.read_text() for name in PACKAGES for file in (ROOT / name).rglob("*.py"))
    assert sorted(sections) == sorted(set(re.findall(r"^class ([A-Z]\w*(?:Error|Warning))\(", code, re.MULTILINE)))


def test_every_architecture_is_in_the_table_of_saes():
    first = (DOCS / "saes.md").read_text().partition("## ")[0]
    assert TRAINING.keys() <= {*re.findall(r"`(writesae_\w+)`", first)}


@pytest.mark.parametrize("file", LINKED, ids=lambda file: file.stem)
def test_links_lead_to_a_file_and_a_heading(file: Path):
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", file.read_text(encoding="utf-8")):
        target = (file.parent / path).resolve() if path else file
        if target.parts[-3:-1] == ("docs", "tutorials") and target.stem != "index":  # the site makes a page of each
            target = target.parents[2] / "tutorials" / f"{target.stem}.ipynb"
        assert target.exists(), path
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), f"{path}#{anchor}"


def anchors(page: str) -> set[str]:
    """Of each heading, as MkDocs names it."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def test_tables_and_docstrings_show_every_character():
    assert tables.escape("<k, q> and `a < b`") == "&lt;k, q> and `a < b`"
    assert tables.table(("a",), [("|cosine| < 1",), ("",)]).splitlines()[2:] == ["| \\|cosine\\| &lt; 1 |", "| – |"]


def test_every_picture_is_shown_and_no_older_than_its_sources():
    """`python tools/pictures.py NAME` makes one again."""
    pages = [page.read_text() for page in (ROOT / "README.md", *PAGES)]
    shown = {name for page in pages for name in re.findall(r"!\[[^\]]*\]\([^)]*images/([^)]+)\)", page)}
    assert shown == set(pictures.PICTURES) == {path.name for path in pictures.IMAGES.glob("*.png")}
    notes = json.loads(pictures.SOURCES.read_text())
    assert {name: pictures.note(name) for name in shown} == {name: notes[name] for name in shown}


def test_no_page_needs_a_network():
    assert "font: false" in (ROOT / "mkdocs.yml").read_text()
    for file in [ROOT / "mkdocs.yml", *DOCS.glob("*.css"), *PAGES]:
        assert not re.search(r"(?:src|href)=\"https?:|url\(['\"]?https?:|<script", file.read_text()), file


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=pytest.mark.nightly if page.stem in LONG else pytest.mark.slow)
        for page in WRITTEN
    ],
)
def test_a_page_runs_and_prints_what_its_comments_say(page: Path, tmp_path: Path):
    code = "\n".join(BLOCK.findall(page.read_text()))
    with fresh_start(tmp_path):
        assert_comments_hold(code, printed(code, page.name))
