"""One page per evaluation, made from its class, and the page of the paper's claims that they answer."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from functools import cache

import griffe

from docs_site import texts
from writesae import EVALUATIONS, Evaluation
from writesae.experiment.evaluation import Scope
from writesae.verdict.paper import PAPER_CLAIMS

LABELS = {
    Scope.EACH: ("my-sae",),
    Scope.LAYER: ("my-sae",),
    Scope.HEAD: ("my-sae",),
    Scope.SEEDS: ("seed-0", "seed-1"),
    Scope.TARGETS: ("write", "state"),
    Scope.VARIANTS: ("bilinear", "flat"),
}
"""Folders of the SAEs in the examples."""


def pages() -> dict[str, str]:
    """Path -> Markdown of every evaluation's page, of their index and of the page of claims."""
    rows = [(f"[{kind}]({kind}.md)", each.question, each.scope.value) for kind, each in EVALUATIONS.items()]
    claims = []
    for number, claim in PAPER_CLAIMS.items():
        kinds = [f"[{kind}](evaluations/{kind}.md)" for kind, each in EVALUATIONS.items() if number in each.answers]
        claims.append((number, *claim, ", ".join(kinds)))
    head = ("", "claim", "where", "n", "the paper's value", "answered by")
    return {
        "evaluations/index.md": texts.page("evaluations", table=texts.table(("name", "question", "takes"), rows)),
        "claims.md": texts.page("claims", table=texts.table(head, claims)),
        **{f"evaluations/{kind}.md": page(each) for kind, each in EVALUATIONS.items()},
    }


def read(kind: str) -> tuple[dict[str, object], str]:
    """Settings of the example, which runs in a minute (a first line `example: n_atoms=8, ...`), and the rest of the
    hand-written text."""
    text = texts.read("evaluations", kind, ["Formula"])
    if not text.startswith("example: "):
        return {}, text
    line, _, body = text.partition("\n\n")
    call = ast.parse(f"f({line.removeprefix('example: ')})", mode="eval").body
    assert isinstance(call, ast.Call)
    return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}, body


def page(evaluation: type[Evaluation]) -> str:
    """The page of one evaluation."""
    example_settings, text = read(evaluation.kind)
    flags = "".join(f" --{key.replace('_', '-')} {_flag(value)}" for key, value in example_settings.items())
    answers = [(n, PAPER_CLAIMS[n].claim, PAPER_CLAIMS[n].cell, PAPER_CLAIMS[n].value) for n in evaluation.answers]
    claims = texts.table(("", "claim", "where", "the paper's value"), answers) if answers else "None of the paper's.\n"
    return texts.page(
        "evaluation",
        evaluation=evaluation,
        definition=texts.escape(inspect.cleandoc(vars(evaluation).get("__doc__") or _missing(evaluation.__name__))),
        text=texts.run(text, f"evaluation {evaluation.kind}").markdown,
        claims=claims,
        command=f"writesae eval {evaluation.kind} {' '.join(LABELS[evaluation.scope])}{flags}",
        example=example(evaluation, example_settings),
        settings=settings(evaluation),
        tables=tables(evaluation),
    )


def example(evaluation: type[Evaluation], given: dict[str, object]) -> str:
    """Python that runs one evaluation on SAEs in folders named as in `LABELS`."""
    labels = LABELS[evaluation.scope]
    saes = ", ".join(f'"{label}": load_sae("{label}")' for label in labels)
    return texts.page(
        "example",
        evaluation=evaluation,
        saes="{" + saes + "}" if evaluation.scope.compares else f'load_sae("{labels[0]}")',
        settings=", ".join(f"{key}={value!r}" for key, value in given.items()).replace("'", '"'),
    )


@cache
def package() -> griffe.Object:
    """The source of the package, which has the strings below fields."""
    return griffe.load("writesae", resolve_aliases=True)


def settings(evaluation: type[Evaluation]) -> str:
    """Field, default and meaning, inherited fields last."""
    members = package()[f"evaluations.{evaluation.kind}.{evaluation.__name__}"].all_members
    own = set(vars(evaluation)["__annotations__"])
    rows = []
    for each in sorted(dataclasses.fields(evaluation), key=lambda each: each.name not in own):
        docstring = members[each.name].docstring
        meaning = docstring.value if docstring else _missing(f"{evaluation.__name__}.{each.name}")
        rows.append((f"`{each.name}`", f"`{each.default!r}`", meaning))
    return texts.table(("field", "default", "meaning"), rows)


def tables(evaluation: type[Evaluation]) -> str:
    """Every table with its columns."""
    parts = []
    for name, columns in evaluation.columns.items():
        rows = [(f"`{c}`", m.strip() or _missing(f"column {c} of table {name}")) for c, m in columns.items()]
        parts.append(f"### `{name}`\n\n{texts.table(('column', 'what it is'), rows)}\n")
    return "".join(parts)


def _flag(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _missing(name: str) -> str:
    raise texts.MissingTextError(f"{name} needs a docstring that says what it is")
