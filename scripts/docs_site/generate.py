"""Run by mkdocs-gen-files while the site is built: writes the generated pages and the navigation.

Pages of hooks, evaluations and errors follow the code: a new one needs a text in `texts/` and nothing here. The build
fails, naming the file to write, where one is missing.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "WANDB_MODE": "offline"}

import mkdocs_gen_files  # noqa: E402
import nbformat  # noqa: E402
from nbconvert import MarkdownExporter  # noqa: E402

from docs_site import error_pages, evaluation_pages, hook_pages, mathml, texts  # noqa: E402

ROOT = Path(__file__).parents[2]
SECTIONS: dict[str, tuple[str, ...]] = {
    "Start": (
        "index.md",
        "install.md",
        "quickstart.md",
        "attention.md",
        "transformer_lens.md",
        "saelens.md",
        "attach.md",
        "glossary.md",
    ),
    "Tutorials": ("tutorials/",),
    "Hooks": ("hooks/",),
    "Evaluations": ("evaluations/",),
    "Findings": ("results.md", "dictionaries.md", "verdicts.md", "claims.md", "coverage.md"),
    "Models and speed": (
        "families.md",
        "tools.md",
        "compatibility.md",
        "benchmarks.md",
        "real_size.md",
        "reliability.md",
    ),
    "API and errors": ("api/", "errors/"),
    "Development": ("ARCHITECTURE.md", "CONTRIBUTING.md", "decisions/"),
}
"""The navigation: pages and folders in reading order. The build fails where a page of docs/ is in no section."""
ROOT_PAGES = ("ARCHITECTURE.md", "CONTRIBUTING.md")
"""Pages of the repository's root, which belong to the site too."""


def main() -> None:
    """Write every generated page."""
    for name in ("sae_lens", "transformers", "transformer_lens"):
        logging.getLogger(name).setLevel(logging.ERROR)
    pages: dict[str, str | bytes] = {**hook_pages.pages(), **error_pages.pages(), **evaluation_pages.pages()}
    pages |= notebooks() | {name: of_root(name) for name in ROOT_PAGES if (ROOT / name).is_file()}
    decisions = {
        f"decisions/{path.name}": path.read_text("utf-8") for path in sorted((ROOT / "docs/decisions").glob("*.md"))
    }
    pages["decisions/index.md"] = texts.page("decisions", table=listing(decisions))
    pages["SUMMARY.md"] = summary(pages | decisions)
    for path, content in pages.items():
        with mkdocs_gen_files.open(path, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())


def notebooks() -> dict[str, str | bytes]:
    """The tutorials with the outputs that they were committed with: a page each, their images, and an index."""
    pages: dict[str, str | bytes] = {}
    for path in sorted((ROOT / "tutorials").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = mathml.formulas(cell.source)
        resources = {"output_files_dir": f"{path.stem}_files"}
        body, made = MarkdownExporter().from_notebook_node(notebook, resources)
        pages[f"tutorials/{path.stem}.md"] = re.sub(r"\((\d_\w+)\.ipynb\)", r"(\1.md)", body)
        pages |= {f"tutorials/{name}": data for name, data in (made.get("outputs") or {}).items()}
    return pages | {"tutorials/index.md": texts.page("tutorials", table=listing(pages))}


def of_root(name: str) -> str:
    """A page of the repository's root. Links into docs/ become links of the site; other files of the repository are
    named and not linked."""

    def link(found: re.Match[str]) -> str:
        text, target = found.groups()
        if re.match(r"https?://|#", target) or target in ROOT_PAGES:
            return found.group(0)
        path = target.removeprefix("docs/")
        if target.rstrip("/") == "docs/decisions":
            path = "decisions/index.md"
        elif not (target.startswith("docs/") and path.endswith(".md")):
            return text if text.startswith("`") else f"`{text}`"
        return f"[{text}]({path})"

    return re.sub(r"\[([^\]]+)\]\(([^)]+)\)", link, (ROOT / name).read_text(encoding="utf-8"))


def title(text: str | bytes) -> str:
    """The heading of a page, without its Markdown."""
    heading = re.search(r"^# (.+)$", text if isinstance(text, str) else "", flags=re.MULTILINE)
    return heading.group(1).replace("`", "").strip() if heading else ""


def listing(pages: Mapping[str, str | bytes]) -> str:
    """Links to the pages of one folder, for its index."""
    return "".join(f"* [{title(text)}]({Path(path).name})\n" for path, text in pages.items() if path.endswith(".md"))


def summary(pages: Mapping[str, str | bytes]) -> str:
    """SUMMARY.md, the navigation as mkdocs-literate-nav reads it."""
    every = {str(path.relative_to(ROOT / "docs")): path.read_text("utf-8") for path in (ROOT / "docs").rglob("*.md")}
    every |= pages
    lines, left = [], {name for name in every if "/" not in name}
    for section, names in SECTIONS.items():
        lines.append(f"* {section}")
        for name in names:
            of_folder = [path for path in every if name.endswith("/") and path.startswith(name)]
            of_folder.sort(key=lambda path: (not path.endswith("index.md"), path))
            for path in [name] * (name in every) + of_folder:
                link = Path(path).stem if name in ("hooks/", "errors/", "api/", "evaluations/") else title(every[path])
                lines.append(f"    * [{title(every[path]) if path.endswith('index.md') else link}]({path})")
        left -= set(names)
    if left:
        raise ValueError(f"pages that no section of SECTIONS names: {sorted(left)}")
    return "\n".join(lines) + "\n"


main()
