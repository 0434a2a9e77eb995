"""MkDocs hook: what the site has and docs/ has not.

* Blocks ```` ```math ````, and `$...$` of notebooks, become MathML: browsers draw it without a script or a network.
* Tutorials are pages, with the outputs that they were committed with.
* A comment such as `<!-- hook -->` on a page of docs/hooks or docs/evaluations is replaced by what the code says of it.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import griffe
import nbformat
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter
from tables import escape, table

from hookpoints.hooks.table import HOOKS
from hookpoints.rules import RULES
from writesae.evaluations import EVALUATIONS
from writesae.verdict.paper import PAPER_CLAIMS

TUTORIALS = Path(__file__).resolve().parents[1] / "tutorials"
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
    """Markdown of a notebook with `$$...$$` and `$...$` as MathML; a dollar sign in code is left alone."""

    def one(found: re.Match[str]) -> str:
        code, display, inline = found.groups()
        # In a span, since Python-Markdown takes <math> at the start of a line for a block.
        return code or (fence(display.replace("\n", " ")) if display else f"<span>{convert(inline)}</span>")

    return re.sub(r"(```.*?```|`[^`]*`)|\$\$(.+?)\$\$|\$([^\s$](?:[^$]*?[^\s$])?)\$", one, text, flags=re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """The tutorials: a page each, and their images."""
    for path in sorted(TUTORIALS.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            cell.source = formulas(cell.source) if cell.cell_type == "markdown" else cell.source
        body, made = MarkdownExporter().from_notebook_node(notebook, {"output_files_dir": f"{path.stem}_files"})
        body = re.sub(r"\((\d_\w+)\.ipynb\)", r"(\1.md)", body.replace("](../docs/", "](../"))
        pages = {f"{path.stem}.md": body, **made["outputs"]}
        for name, content in pages.items():
            files.append(File.generated(config, f"tutorials/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The text of a page with its comments replaced."""
    return re.sub(r"<!-- (\w+) -->", lambda found: PARTS[found[1]](Path(page.file.src_uri).stem), markdown)


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
    return griffe.load("writesae", resolve_aliases=True)  # type: ignore[return-value]


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


def claims(_: str) -> str:
    """Every claim of the paper."""
    kinds = {
        n: [f"[{k}](evaluations/{k}.md)" for k, each in EVALUATIONS.items() if n in each.answers] for n in PAPER_CLAIMS
    }
    rows = [(n, *claim, ", ".join(kinds[n])) for n, claim in PAPER_CLAIMS.items()]
    return table(("", "claim", "where", "n", "the paper's value", "answered by"), rows)


PARTS: dict[str, Callable[[str], str]] = {
    each.__name__: each for each in (hook, hooks, evaluations, definition, settings, claims)
}
"""What replaces a comment, given the name of its page."""
