"""One page per evaluation of the suite, and the page of the paper's claims that they answer."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

from docs_site import texts
from docs_site.markdown import cell, code_cell, prose, table
from sae_lens_writesae.suite import EVALUATIONS, Entry, Scope
from sae_lens_writesae.verdict.paper import PAPER_CLAIMS

WANTED = "if wished a first line 'example: field=value, ...' (settings that run in a minute), and '## Formula'"

LABELS = {
    Scope.EACH: ("my-sae",),
    Scope.HEAD: ("my-sae",),
    Scope.SEEDS: ("seed-0", "seed-1"),
    Scope.TARGETS: ("write", "state"),
    Scope.VARIANTS: ("bilinear", "flat"),
}
"""Folders of the SAEs in the examples."""


class Text(NamedTuple):
    """The hand-written part of a page."""

    settings: str
    """Arguments of the config in the example."""
    markdown: str


def pages() -> dict[str, str]:
    """Path -> Markdown of every evaluation's page, of their index and of the claims' page."""
    made = {f"evaluations/{name}.md": page(name, entry, read(name)) for name, entry in EVALUATIONS.items()}
    return {"evaluations/index.md": index(), "claims.md": claims()} | made


def read(name: str) -> Text:
    """The text of one evaluation, checked."""
    text = texts.read("evaluations", name, WANTED)
    if "## Formula" not in text:
        raise texts.MissingTextError(f"the text of evaluation {name} needs {WANTED}")
    head, _, body = text.partition("\n\n") if text.startswith("example: ") else ("", "", text)
    return Text(head.removeprefix("example: "), body)


def page(name: str, entry: Entry, text: Text) -> str:
    """The page of one evaluation."""
    result = entry.result_class
    definition = own_docstring(result)
    if not definition:
        raise texts.MissingTextError(f"{result.__name__} has no docstring: its definition and what would refute it")
    ran = texts.run(text.markdown, f"evaluation {name}")
    if ran.raised is not None:
        raise RuntimeError(f"an example of evaluation {name} raised {ran.raised!r}") from ran.raised
    lines = [
        f"# {result.title}",
        "",
        f"Evaluation `{name}`: {entry.question} Takes {entry.scope.value}.",
        "",
        "## Definition, and what would refute it",
        "",
        prose(definition),
        "",
        ran.markdown.rstrip(),
        "",
        *_claims(entry.claims),
        *_run(name, entry, text),
        *_settings(entry.config_class),
        *_tables(result),
        "## Source",
        "",
        f"`sae_lens_writesae.{entry.module}`: `{entry.function}`, `{entry.config}`, `{entry.result}`.",
        "",
        prose(inspect.getdoc(entry.run) or ""),
    ]
    return "\n".join(lines)


def index() -> str:
    """All evaluations by their question."""
    rows = [
        (f"[{name}]({name}.md)", prose(entry.result_class.title), entry.scope.value)
        for name, entry in EVALUATIONS.items()
    ]
    lines = [
        "# Evaluations",
        "",
        "Each evaluation is one question about one dictionary, or about several. It has a config that checks itself, "
        "tidy tables, claims with [verdicts by fixed rules](../verdicts.md), and figures. "
        "`writesae eval NAME SAE` runs it; `writesae eval all SAE` runs every one that fits and writes one page.",
        "",
        *table(("name", "question", "takes"), rows),
        "",
        "[The paper's claims](../claims.md) says which of them answers which claim.",
    ]
    return "\n".join(lines)


def claims() -> str:
    """The paper's claims, and the evaluations that answer them."""
    rows = []
    for number, claim in PAPER_CLAIMS.items():
        answered = [f"[{name}](evaluations/{name}.md)" for name, entry in EVALUATIONS.items() if number in entry.claims]
        cells = (cell(claim.claim), cell(claim.cell), cell(claim.n), cell(claim.value))
        rows.append((str(number), *cells, ", ".join(answered) or "–"))
    lines = [
        "# The paper's claims",
        "",
        "What WriteSAE (arXiv 2605.12770, v4) claims, as data (`sae_lens_writesae.claims.PAPER_CLAIMS`), and which "
        "evaluation answers each. The values are the paper's, measured on its models; here they are measured again on "
        "the model and dictionary at hand. Sizes need not agree; signs and orders should. "
        "[How a verdict is reached](verdicts.md).",
        "",
        *table(("", "claim", "where", "n", "the paper's value", "answered by"), rows),
    ]
    return "\n".join(lines)


def example(name: str, entry: Entry, text: Text) -> str:
    """Python that runs one evaluation on SAEs in folders named as in `LABELS`."""
    labels = LABELS[entry.scope]
    if not entry.compares:
        given, argument = [f'sae = load_sae("{labels[0]}")'], "sae"
    else:
        given, argument = [f"saes = {{label: load_sae(label) for label in {list(labels)!r}}}".replace("'", '"')], "saes"
    imports = sorted(
        [
            "from sae_lens_writesae import load_sae",
            "from sae_lens_writesae.evaluate import spread",
            "from sae_lens_writesae.suite import EVALUATIONS",
        ]
    )
    lines = [
        "from hookpoints import HookedRecurrent, embedded",
        *imports,
        "",
        'model = HookedRecurrent.from_pretrained("embedded")',
        'tokens = spread(model, embedded.text("test"), context_size=128, sequences=32)',
        *given,
        f'entry = EVALUATIONS["{name}"]',
        f"config = entry.config_class({text.settings})",
        f"result = entry.run(model, {argument}, tokens, config, progress=False)",
        "for claim in result.claims():",
        '    print(claim.outcome, "|", claim.claim, "|", claim.measured)',
    ]
    return "\n".join(lines) + "\n"


def own_docstring(cls: type[Any]) -> str:
    """The docstring that the class itself has; inherited ones say nothing of it."""
    return inspect.cleandoc(cls.__dict__.get("__doc__") or "")


def field_docs(cls: type[Any]) -> dict[str, str]:
    """Strings below the fields of a dataclass, its bases' included."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        for node, after in itertools.pairwise(body):
            is_doc = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and is_doc:
                found[node.target.id] = " ".join(str(after.value.value).split())  # type: ignore[union-attr]
    return found


_SHARED_FIELDS = {
    "seed": "Seed of every draw.",
    "label": "Name in reports.",
    "n_atoms": "Atoms drawn uniformly from all alive atoms that can be tested. None: all of them.",
    "atoms": "A hand-picked list instead of a draw. Conclusions then hold for these atoms only.",
    "firings_per_atom": "At most this many firings of an atom.",
    "scale": "How the atom is scaled: coefficient, matched or least_squares.",
    "controls": "Controls to run, of `conditions.CONTROLS`.",
}
"""Fields that mean the same wherever they occur; a docstring of the field's own comes first."""


def _settings(config: type[Any]) -> list[str]:
    docs = field_docs(config)
    rows = []
    for field in dataclasses.fields(config):
        meaning = docs.get(field.name) or _SHARED_FIELDS.get(field.name)
        if not meaning:
            raise texts.MissingTextError(f"{config.__name__}.{field.name} has no docstring: what it sets, in its unit")
        rows.append((f"`{field.name}`", code_cell(_default(field)), cell(meaning)))
    return [
        "## Settings",
        "",
        f"`{config.__name__}`; on the command line `--set field=value`.",
        "",
        *table(("field", "default", "meaning"), rows),
        "",
    ]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    return repr(field.default_factory()) if field.default_factory is not dataclasses.MISSING else "required"


def _tables(result: type[Any]) -> list[str]:
    lines = ["## Tables", "", "Tidy pandas tables in `result.tables`, kept as parquet by `result.save`.", ""]
    for name, columns in result.COLUMNS.items():
        if empty := [column for column, meaning in columns.items() if not meaning.strip()]:
            raise texts.MissingTextError(f"{result.__name__}.COLUMNS[{name!r}] does not say what {empty} are")
        rows = [(f"`{column}`", cell(meaning)) for column, meaning in columns.items()]
        lines += [f"### `{name}`", "", *table(("column", "what it is"), rows), ""]
    return lines


def _claims(numbers: Sequence[int]) -> list[str]:
    if not numbers:
        return ["## Claims", "", "None of the paper's: its claims are this project's own.", ""]
    rows = [
        (
            str(number),
            cell(PAPER_CLAIMS[number].claim),
            cell(PAPER_CLAIMS[number].cell),
            cell(PAPER_CLAIMS[number].value),
        )
        for number in numbers
    ]
    return ["## Claims of the paper that it answers", "", *table(("", "claim", "where", "the paper's value"), rows), ""]


def _run(name: str, entry: Entry, text: Text) -> list[str]:
    folders = " ".join(LABELS[entry.scope])
    settings = " ".join(f"--set {pair.strip()}" for pair in _pairs(text.settings))
    command = f"writesae eval {name} {folders} {settings}".rstrip()
    return [
        "## How to run it",
        "",
        "```bash",
        command,
        "```",
        "",
        "or, with SAEs in the same folders,",
        "",
        f"```python\n{example(name, entry, text)}```",
        "",
    ]


def _pairs(settings: str) -> list[str]:
    """`"a=1, b=(2, 3)"` as `["a=1", "b=[2, 3]"]`, the way that --set reads values."""
    if not settings:
        return []
    call: Any = ast.parse(f"f({settings})", mode="eval").body
    made = []
    for keyword in call.keywords:
        value = ast.literal_eval(keyword.value)
        shown = value if isinstance(value, str) else json.dumps(value)
        made.append(f"{keyword.arg}={shown}" if " " not in shown else f"{keyword.arg}='{shown}'")
    return made
