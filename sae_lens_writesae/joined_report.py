"""One page over everything that was evaluated: claim, the paper's value, the value here, controls, verdict; then why.

Made from saved evaluations alone. Beside the page lie the same numbers: `report.json`, `claims.csv`, and every table of
one kind joined over dictionaries in `tables/<kind>-<table>.parquet`.
"""

from __future__ import annotations

import inspect
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pandas as pd

from sae_lens_writesae.evaluation import Claim, Evaluation
from sae_lens_writesae.left_out import LeftOut, load_result
from sae_lens_writesae.plots import number
from sae_lens_writesae.report import ReportFiles
from sae_lens_writesae.substitution_evaluation import Substitution, all_heads
from sae_lens_writesae.suite import EVALUATIONS
from sae_lens_writesae.verdict.paper import OTHER_MODELS, PAPER_CLAIMS, Outcome
from sae_lens_writesae.writing import write_aside

_ROWS = 40
"""Rows of a table that the page shows; the files hold all of them."""


class Row(NamedTuple):
    """A claim as one dictionary (or one comparison) answers it."""

    label: str
    claim: Claim


def find_results(paths: Sequence[str | Path]) -> list[Evaluation]:
    """Every saved evaluation in or below the folders, in the order of `in_order`, then of folders.

    Raises:
        ValueError: a folder without any; a saved evaluation of a kind that this version does not know.
    """
    results: list[Evaluation] = []
    for path in map(Path, paths):
        folders = sorted(file.parent for file in path.rglob("info.json") if not _hidden(file.relative_to(path)))
        if not folders:
            raise ValueError(f"no evaluation was saved in or below {path} (looked for info.json)")
        results += map(load_result, folders)
    return in_order(results)


def in_order(results: Iterable[Evaluation]) -> list[Evaluation]:
    """By kind as in `suite.EVALUATIONS`, what could not be measured last; then dictionaries of writes first."""
    order = [*EVALUATIONS, LeftOut.kind]
    return sorted(results, key=lambda result: (order.index(result.kind), result.info.get("target") != "write"))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def write_joined_report(results: Sequence[Evaluation], path: str | Path, *, title: str | None = None) -> ReportFiles:
    """Write the page `path` (.html), the numbers beside it (.json), `claims.csv` and `tables/`.

    Raises:
        ValueError: no result.
    """
    if not results:
        raise ValueError("a report needs at least one evaluation, found none")
    target, results = Path(path).with_suffix(".html"), in_order(results)
    rows = claim_rows(results)
    numbers = {
        "claims": [{"label": row.label, "paper": row.claim.paper, **vars(row.claim)} for row in rows],
        "evaluations": [{"kind": result.kind, "info": result.info} for result in results],
    }
    table = pd.DataFrame(numbers["claims"], columns=["label", "paper", *Claim.__dataclass_fields__])
    table = table.astype({"number": "Int64"})
    for name, joined in joined_tables(results).items():
        write_aside(
            target.parent / "tables" / f"{name}.parquet", lambda file, t=joined: t.to_parquet(file, index=False)
        )
    texts = {
        target.with_name("claims.csv"): table.to_csv(index=False),
        target.with_suffix(".json"): json.dumps(numbers, indent=1, allow_nan=False),
        target: _render(results, rows, title or _title(results), target.with_suffix(".json").name),
    }
    for file, text in texts.items():
        write_aside(file, lambda aside, text=text: aside.write_text(text, encoding="utf-8"))
    return ReportFiles(target, target.with_suffix(".json"))


def claim_rows(results: Sequence[Evaluation]) -> list[Row]:
    """Every answer, by number of the paper's claim; the project's own claims after them."""
    rows = [Row(result.label, claim) for result in results for claim in result.claims()]
    tests = [result for result in results if isinstance(result, Substitution)]
    for target in dict.fromkeys(test.info["target"] for test in tests):
        over_heads = all_heads([test for test in tests if test.info["target"] == target])
        if over_heads is not None:
            rows.append(Row(f"{target}-trained", over_heads))
    return sorted(rows, key=lambda row: row.claim.number or len(PAPER_CLAIMS) + 1)


def joined_tables(results: Sequence[Evaluation]) -> dict[str, pd.DataFrame]:
    """Each table of each kind over all results, with `label`, and `layer` and `head` where they are known."""
    parts: dict[str, list[pd.DataFrame]] = {}
    for result in results:
        known = {"label": result.label} | {k: result.info[k] for k in ("layer", "head") if k in result.info}
        for name, table in result.tables.items():
            new = {f"of_{k}" if k in table else k: v for k, v in known.items()}
            parts.setdefault(f"{result.kind}-{name}", []).append(table.assign(**new))
    return {name: pd.concat(tables, ignore_index=True) for name, tables in parts.items()}


_ORDER: tuple[Outcome, ...] = (
    "holds",
    "confounded",
    "undecided",
    "fails",
    "inconclusive",
    "below the floor",
    "not tested",
)


def lead(rows: Sequence[Row]) -> str:
    """The outcome of all answers in one sentence."""
    counts = Counter(row.claim.outcome for row in rows)
    parts = [f"{outcome}: {counts[outcome]}" for outcome in _ORDER if counts[outcome]]
    return f"{len(rows)} answers to claims. {'; '.join(parts).capitalize()}."


def unanswered(rows: Sequence[Row]) -> list[str]:
    """What the paper claims and nothing here answers, with what would."""
    answered = {row.claim.number for row in rows}
    missing = {n: claim.claim for n, claim in PAPER_CLAIMS.items() if n not in answered}
    by = {n: name for name, entry in EVALUATIONS.items() for n in entry.claims}
    where = OTHER_MODELS | {5: "several heads"}
    wanted = {n: f"{by[n]} on {where[n]}" if n in where else by[n] for n in missing}
    return [f"{n}. {claim} (needs the evaluation {wanted[n]})" for n, claim in missing.items()]


def _title(results: Sequence[Evaluation]) -> str:
    models = dict.fromkeys(str(r.info["model"]) for r in results if "model" in r.info)
    return f"What the atoms of {', '.join(models)} do" if models else "What the atoms do"


def _render(results: Sequence[Evaluation], rows: list[Row], title: str, numbers: str) -> str:
    loader = jinja2.PackageLoader("sae_lens_writesae", "")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"cell": _cell, "slug": lambda text: "".join(c if c.isalnum() else "-" for c in text)}
    kinds = [list(group) for _, group in itertools.groupby(results, key=lambda result: result.kind)]
    return environment.get_template("joined_report.html").render(
        title=title,
        lead=lead(rows),
        groups=_by_claim(rows),
        unanswered=unanswered(rows),
        numbers=numbers,
        sections=[(type(kind[0]), _paragraphs(type(kind[0])), kind) for kind in kinds],
        rows_shown=_ROWS,
        facts=_facts(results),
    )


def _by_claim(rows: list[Row]) -> list[tuple[Any, list[Row]]]:
    """Rows under the paper's claim that they answer; the project's own claims each under its own words."""

    def key(row: Row) -> Any:
        return row.claim.number or row.claim.claim

    groups = [(k, list(group)) for k, group in itertools.groupby(sorted(rows, key=lambda r: str(key(r)).zfill(4)), key)]
    return [(PAPER_CLAIMS.get(k) if isinstance(k, int) else None, group) for k, group in groups]


class Paragraph(NamedTuple):
    """Of a description: a text, and the points of the list that follows it."""

    text: str
    points: list[str]
    numbered: bool = False


def _paragraphs(kind: type[Evaluation]) -> list[Paragraph]:
    """The class's own description, which defines the measure and its verdict."""
    found: list[Paragraph] = []
    for part in (inspect.getdoc(kind) or "").replace("`", "").split("\n\n"):
        text, *points = (" ".join(piece.split()) for piece in re.split(r"(?:^|\n) *(?:\*|\d+\.) ", part))
        if text or not found:
            found.append(Paragraph(text, points, bool(re.search(r"(?:^|\n) *1\. ", part))))
        else:
            found[-1].points.extend(points)
    return found


def _facts(results: Sequence[Evaluation]) -> dict[str, str]:
    """What holds for the whole page: models, heads, dictionaries, time."""
    infos = [result.info for result in results]

    def listed(name: str) -> str:
        return ", ".join(dict.fromkeys(str(info[name]) for info in infos if info.get(name) is not None))

    heads = dict.fromkeys(f"L{i['layer']}H{i['head']}" for i in infos if "layer" in i)
    seconds = sum(float(info.get("seconds", 0)) for info in infos)
    facts = {"model": listed("model"), "update rule": listed("rule"), "heads": ", ".join(heads)}
    facts |= {"dtype": listed("dtype"), "architecture of the SAEs": listed("architecture"), "atoms": listed("d_sae")}
    return {name: value for name, value in facts.items() if value} | {"evaluations took": f"{seconds:.0f} s"}


def _cell(value: Any) -> str:
    """A table's value for a person."""
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, float):
        return number(value)
    return f"{value:,}" if isinstance(value, int) else str(value)
