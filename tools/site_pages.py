"""MkDocs hook: what the site has and docs/ has not.

* Blocks ```` ```math ````, and `$...$`, become MathML: browsers draw it without a script or a network.
* Tutorials are pages, with the outputs that they were committed with.
* A comment such as `<!-- hook -->` on a page of docs/hooks is replaced by what the code says.
* A link from the product's pages to the study's, or back, leads from one site to the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter
from tables import table

from hookpoints.hooks.table import HOOKS
from hookpoints.rules.known import RULES

SCOPES = {
    "model": "the model (one)",
    "block": "each block",
    "mixer": "each recurrent mixer",
    "head": "each head of each recurrent mixer",
    "attn": "each block with attention",
}
MATRIX = "K × V (in patterns S) numbers per token and head: computed only for hooks, and left out of `run_with_cache` "
VECTOR = "a vector or a number per token; part of `run_with_cache`"


def on_config(config: Any) -> Any:
    """SuperFences hands blocks of the language `math` to `fence`."""
    own = {"name": "math", "class": "math", "format": fence}
    config["mdx_configs"].setdefault("pymdownx.superfences", {}).setdefault("custom_fences", []).append(own)
    return config


def fence(source: str, *_: Any, **__: Any) -> str:
    """One display formula a line; empty lines are skipped."""
    return "".join(f'<div class="math">{convert(x, display="block")}</div>' for x in source.splitlines() if x.strip())


def formulas(text: str) -> str:
    """Markdown with `$$...$$` and `$...$` as MathML; a dollar sign in code is left alone."""

    def one(found: re.Match[str]) -> str:
        code, display, inline = found.groups()
        # In a span, since Python-Markdown takes <math> at the start of a line for a block.
        return code or (fence(display.replace("\n", " ")) if display else f"<span>{convert(inline)}</span>")

    return re.sub(r"(```.*?```|`[^`]*`)|\$\$(.+?)\$\$|\$([^\s$](?:[^$]*?[^\s$])?)\$", one, text, flags=re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """The tutorials: a page each, and their images."""
    for path in sorted((Path(config["docs_dir"]).parent / "tutorials").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            cell.source = formulas(cell.source) if cell.cell_type == "markdown" else cell.source
        body, made = MarkdownExporter().from_notebook_node(notebook, {"output_files_dir": f"{path.stem}_files"})
        body = notebook_links(body)
        pages = {f"{path.stem}.md": body, **made["outputs"]}
        for name, content in pages.items():
            files.append(File.generated(config, f"tutorials/{name}", content=content))
    return files


def notebook_links(body: str) -> str:
    """Links from a notebook's folder as links from the page that it becomes, in `docs/tutorials`."""
    body = re.sub(r"\((\d_\w+)\.ipynb\)", r"(\1.md)", body.replace("](../docs/", "](../"))
    body = re.sub(r"\]\(\.\./((?:\.\./|study/)docs/)", r"](../../\1", body)
    return re.sub(r"\]\(\.\./(\.\./|study/)tutorials/(\w+)\.ipynb", r"](../../\1docs/tutorials/\2.md", body)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The text of a page with its comments and formulas replaced."""
    place = Path(page.file.src_uri)
    text = markdown if place.parent.name == "tutorials" else formulas(markdown)  # those of notebooks are, with outputs
    return with_links(with_parts(text, PARTS, place.stem))


def with_parts(markdown: str, parts: dict[str, Callable[[str], str]], name: str) -> str:
    """The text of the page of that name, with those comments replaced that `parts` has."""
    return re.sub(r"<!-- (\w+) -->", lambda found: parts[found[1]](name) if found[1] in parts else found[0], markdown)


def with_links(markdown: str) -> str:
    """Links between the folders `docs` and `study/docs` as links between the sites."""
    # As HTML: MkDocs knows the pages of one site, and refuses a link to another.
    return re.sub(
        r"\[([^\]]+)\]\(((?:\.\./)*)\.\./(study/)?docs/([\w/.-]+)\.md(#[\w-]+)?\)",
        lambda found: f'<a href="{found[2]}{found[3] or ""}{found[4]}.html{found[5] or ""}">{found[1]}</a>',
        markdown,
    )


def hook(name: str) -> str:
    """What the hook table says of one hook."""
    row = next(row for row in HOOKS if f"{row.scope}.{row.name}" == name)
    shape = "] or [".join(", ".join(axes).replace("(, K, V, )", "K·V") for axes in row.axes.split() if axes != "or")
    have = {rule.name for rule in RULES if row.factor in rule.hook_factors}
    facts = {
        "name": f"`{row.full_name()}`",
        "one for": SCOPES[row.scope],
        "shape": f"`[{shape}]`",
        "fires": row.fires,
        "an edit": row.edit,
        "several steps a token": f"`{row.axes_of(2)}`: an axis R, where a token takes R > 1 steps" * row.per_step,
        "rules that have it": ", ".join(sorted(have)),
        "rules that do not": ", ".join(sorted({rule.name for rule in RULES} - have)) if row.factor else "",
        "memory": MATRIX + "unless named" if row.matrix else VECTOR,
    }
    return (
        f"{row.meaning[0].upper()}{row.meaning[1:]}.\n\n{table(('', ''), [fact for fact in facts.items() if fact[1]])}"
    )


def hooks(_: str) -> str:
    """Every hook."""
    return table(
        ("hook", "axes", "what it is"),
        ((f"[`{row.full_name()}`]({row.scope}.{row.name}.md)", f"`{row.axes}`", row.meaning) for row in HOOKS),
    )


PARTS: dict[str, Callable[[str], str]] = {each.__name__: each for each in (hook, hooks)}
"""What replaces a comment, given the name of its page. Other hooks have comments of their own."""
