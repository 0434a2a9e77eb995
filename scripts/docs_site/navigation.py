"""The navigation: hand-written pages in reading order, whatever else lies in docs/, then what is generated."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from docs_site import catalogue, hook_pages
from docs_site.catalogue import ROOT
from docs_site.notebooks import Notebook
from sae_lens_writesae.suite import EVALUATIONS

DOCS = ROOT / "docs"
FIRST = ("index", "install", "quickstart", "families", "attach")
"""Hand-written pages that stand first, where they exist."""
LAST = ("verdicts",)
"""Hand-written pages that belong to the evaluations."""
GENERATED = ("claims",)


def summary(tutorials: Sequence[Notebook]) -> str:
    """SUMMARY.md, as mkdocs-literate-nav reads it."""
    others = sorted({path.stem for path in DOCS.glob("*.md")} - {*FIRST, *LAST, *GENERATED, "SUMMARY"})
    lines = [_link(name) for name in (*FIRST, *others) if (DOCS / f"{name}.md").is_file()]
    lines += ["* [Tutorials](tutorials/index.md)"]
    lines += [f"    * [{short(tutorial.title)}](tutorials/{tutorial.name}.md)" for tutorial in tutorials]
    lines += ["* [Hooks](hooks/index.md)"]
    lines += [f"    * [{hook_pages.title(row)}](hooks/{name}.md)" for name, row in catalogue.hooks().items()]
    lines += ["* [Evaluations](evaluations/index.md)", "    * [Which claims survive](verdicts.md)"]
    lines += ["    * [The paper's claims](claims.md)"]
    lines += [f"    * [{name}](evaluations/{name}.md)" for name in EVALUATIONS]
    lines += ["* [Errors](errors/index.md)"]
    lines += [f"    * [{name}](errors/{name}.md)" for name in catalogue.errors()]
    lines += ["* API"]
    lines += [f"    {_link(f'api/{path.stem}')}" for path in sorted((DOCS / "api").glob("*.md"))]
    return "\n".join(lines) + "\n"


def tutorials_index(tutorials: Sequence[Notebook]) -> str:
    """A page that lists the tutorials."""
    lines = [
        "# Tutorials",
        "",
        "Notebooks in the folder `tutorials/`, run from a clean start by the tests. The pages here show them with the "
        "outputs that they were committed with.",
        "",
        *(f"* [{short(tutorial.title)}]({tutorial.name}.md)" for tutorial in tutorials),
    ]
    return "\n".join(lines)


def short(title: str) -> str:
    """A notebook's heading without its Markdown."""
    return title.replace("`", "").strip()


def _link(name: str) -> str:
    return f"* [{_title(DOCS / f'{name}.md')}]({name}.md)"


def _title(path: Path) -> str:
    heading = re.search(r"^# (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return short(heading.group(1)) if heading else path.stem
