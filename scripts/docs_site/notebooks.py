"""The tutorials as pages, with the outputs that they were committed with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from nbconvert import MarkdownExporter

from docs_site.catalogue import ROOT


class Notebook(NamedTuple):
    """One tutorial."""

    name: str
    title: str
    markdown: str
    images: dict[str, bytes]
    """By path relative to the page's folder."""


def notebooks() -> list[Notebook]:
    """Every notebook of `tutorials/`, by name."""
    return [_read(path) for path in sorted((ROOT / "tutorials").glob("*.ipynb"))]


def _read(path: Path) -> Notebook:
    exporter = MarkdownExporter()
    resources = {"output_files_dir": f"{path.stem}_files"}
    body, made = exporter.from_filename(str(path), resources=resources)
    title = re.search(r"^# (.+)$", body, flags=re.MULTILINE)
    return Notebook(path.stem, title.group(1) if title else path.stem, body, made.get("outputs") or {})
