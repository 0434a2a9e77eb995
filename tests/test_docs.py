"""The documentation covers every hook and error, and what its pages show in Python runs."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.append(str(ROOT / "tools"))

import pictures  # noqa: E402
import tables  # noqa: E402
from examples import fresh_start, printed  # noqa: E402
from test_readme import assert_comments_hold  # noqa: E402

import hookpoints  # noqa: E402
import sae_lens_writesae  # noqa: E402
from hookpoints.hooks.table import HOOKS  # noqa: E402
from sae_lens_writesae.sae import TRAINING  # noqa: E402

BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)\n```$)?", flags=re.MULTILINE | re.DOTALL)
"""A Python block, and what it prints, where that stands below it."""
EXAMPLES = sorted((DOCS / "hooks").glob("[!i]*.md"))
WRITTEN = [page for page in sorted(DOCS.glob("*.md")) if "```python" in page.read_text()]
WRITTEN.remove(DOCS / "your_model.md")  # it needs a checkpoint: test_your_model.py

LONG = ("natural_memory", "reading", "zoo")
"""Pages that run at night: each takes ten seconds or more."""


def page_names(folder: str) -> list[str]:
    return sorted(path.stem for path in (DOCS / folder).glob("*.md") if path.stem != "index")


def test_every_hook_has_a_page_and_every_error_a_section():
    assert page_names("hooks") == sorted(f"{row.scope}.{row.name}" for row in HOOKS)
    sections = re.findall(r"^## `(\w+)`$", (DOCS / "errors.md").read_text(), flags=re.MULTILINE)
    assert sorted(sections) == sorted(exceptions(hookpoints) | exceptions(sae_lens_writesae))


def exceptions(package) -> set[str]:
    """Public exception classes that a package's modules define, found by importing them."""
    modules = [each.name for each in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
    values = [value for name in modules for value in vars(importlib.import_module(name)).values()]
    classes = (value for value in values if inspect.isclass(value) and value.__module__ in modules)
    own = {each.__name__ for each in classes if issubclass(each, Exception)}
    # StopForward ends a pass inside the package; nobody else sees it.
    return {name for name in own if not name.startswith("_")} - {"StopForward"}


def test_every_architecture_is_in_the_table_of_saelens_and_no_text_counts_them():
    """A count in words is not so as soon as one more is registered."""
    first = (DOCS / "saelens.md").read_text().partition("## ")[0]
    assert {*re.findall(r"`(writesae_\w+)`", first)} == TRAINING.keys()
    pages = [page.read_text() for page in (ROOT / "README.md", *DOCS.glob("*.md"))]
    docstrings = [str(module.__doc__) for module in (sae_lens_writesae, sae_lens_writesae.sae)]
    assert [
        text for text in pages + docstrings if re.search(r"\b(?:six|seven|eight|nine|\d+) architectures", text)
    ] == []


def test_tables_and_docstrings_show_every_character():
    assert tables.escape("<k, q> and `a < b`") == "&lt;k, q> and `a < b`"
    assert tables.table(("a",), [("|cosine| < 1",), ("",)]).splitlines()[2:] == ["| \\|cosine\\| &lt; 1 |", "| – |"]


def test_every_picture_is_made_by_the_script_and_shown():
    shown = {
        link.rpartition("/")[2]
        for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
        for link in re.findall(r"!\[[^\]]*\]\(([^)]*images/[^)]+)\)", page.read_text())
    }
    assert shown == set(pictures.PICTURES) == {path.name for path in pictures.IMAGES.glob("*.png")}


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_picture_is_no_older_than_its_sources(name):
    """`python tools/pictures.py NAME` makes it again."""
    assert json.loads(pictures.SOURCES.read_text())[name] == pictures.note(name)


def test_no_page_needs_a_network():
    assert "font: false" in (ROOT / "mkdocs.yml").read_text()
    for file in [ROOT / "mkdocs.yml", *(ROOT / "docs").glob("*.css"), *(ROOT / "docs").glob("*.md")]:
        assert not re.search(r"(?:src|href)=\"https?:|url\(['\"]?https?:|<script", file.read_text()), file


# -- slow: everything that is shown runs


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=pytest.mark.nightly if page.stem in LONG else pytest.mark.slow)
        for page in WRITTEN
    ],
)
def test_written_pages_run(page, tmp_path):
    code = "\n".join(code for code, _ in BLOCK.findall(page.read_text()))
    with fresh_start(tmp_path):
        assert_comments_hold(code, printed(code, page.name))


@pytest.mark.slow
@pytest.mark.parametrize("page", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_prints_what_stands_below_it(page, tmp_path):
    namespace = {"__name__": "__main__"}
    with fresh_start(tmp_path):
        for code, output in BLOCK.findall(page.read_text()):
            assert comparable(printed(code, page.name, namespace)) == comparable(output)


def comparable(text: str) -> str:
    """Without what differs from machine to machine: temporary folders, hashes, versions, rounding."""
    text = re.sub(r"/\S*/(?=model/)|\b[0-9a-f]{64}\b", "", " ".join(text.split()))
    return re.sub(r"[-+]?\d[\d.]*(e[-+]?\d+)?", "0", text)
