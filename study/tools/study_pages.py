"""MkDocs hook of the study's site: what `tools/site_pages.py` does, and the evaluations.

* A comment such as `<!-- settings -->` on a page of study/docs/evaluations is replaced by what the code says.
* Styles and scripts are those of the product's site.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "tools"), str(ROOT / "study")]

from site_pages import with_parts  # noqa: E402
from tables import escape, table  # noqa: E402

from writesae_study.evaluations import EVALUATIONS  # noqa: E402
from writesae_study.verdict.paper import PAPER_CLAIMS  # noqa: E402


def on_files(files: Files, config: Any) -> Files:
    """Styles and scripts of the product's site."""
    for name in ("site.css", "tables.js", "iframe-worker.js"):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / "docs" / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The text of a page with its comments replaced."""
    return with_parts(markdown, PARTS, Path(page.file.src_uri).stem)


def evaluations(_: str) -> str:
    """Every evaluation."""
    return table(
        ("name", "question", "takes"),
        ((f"[{kind}]({kind}.md)", each.question, each.scope.value) for kind, each in EVALUATIONS.items()),
    )


def definition(kind: str) -> str:
    """The docstring of an evaluation."""
    return "## Definition, and what would refute it\n\n" + escape(inspect.cleandoc(vars(EVALUATIONS[kind])["__doc__"]))


@cache
def package() -> griffe.Object:
    """The source of the package, which has the strings below fields."""
    return griffe.load("writesae_study", resolve_aliases=True)  # type: ignore[return-value]


def settings(kind: str) -> str:
    """Claims, fields and tables of an evaluation; inherited fields last."""
    each = EVALUATIONS[kind]
    members = package()[f"evaluations.{kind}.{each.__name__}"].all_members
    fields = sorted(dataclasses.fields(each), key=lambda field: field.name not in vars(each)["__annotations__"])
    rows = [(f"`{f.name}`", f"`{f.default!r}`", members[f.name].docstring.value) for f in fields]
    claims = [(n, PAPER_CLAIMS[n].claim, PAPER_CLAIMS[n].cell, PAPER_CLAIMS[n].value) for n in each.answers]
    answered = table(("", "claim", "where", "the paper's value"), claims) if claims else "None of the paper's.\n"
    tables = (
        f"### `{name}`\n\n{table(('column', 'what it is'), [(f'`{c}`', m) for c, m in columns.items()])}"
        for name, columns in each.columns.items()
    )
    return f"""## Claims of the paper that it answers

{answered}
## Settings

Fields of `{each.__name__}`, and flags of `writesae eval {kind}`.

{table(("field", "default", "meaning"), rows)}
## Tables

Tidy pandas tables in `result.tables`; `result.save` writes them as parquet.

""" + "\n".join(tables)


PARTS: dict[str, Callable[[str], str]] = {each.__name__: each for each in (evaluations, definition, settings)}
