"""One page over everything that was evaluated: claim, the paper's value, the value here, controls, verdict; then why.

The page is made from saved results alone. Beside it lie the same numbers: a JSON file of its name, `claims.csv`, and
every table of one kind joined over dictionaries in `tables/<kind>-<table>.parquet`.
"""

from __future__ import annotations

import inspect
import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from sae_lens_writesae.files import atomic_text, atomic_write
from writesae.evaluations import EVALUATIONS, load_result
from writesae.experiment.controls import Answer, answers
from writesae.experiment.evaluation import Evaluation, Result
from writesae.files import Json, atomic_csv
from writesae.page.template import environment, outcome_text
from writesae.verdict.finding import Claim
from writesae.verdict.paper import OTHER_MODELS, PAPER_CLAIMS, PaperClaim

ONE_SIDE = 0.025
"""Share of 95% intervals that exclude chance on the side of the claim where there is no effect."""
_ROWS = 40
"""Rows of a table that the page shows; the files hold all of them."""


class ReportFiles(NamedTuple):
    """What was written."""

    html: Path
    json: Path

    def __str__(self) -> str:
        return f"report   {self.html}\nnumbers  {self.json}"


def find_results(paths: Sequence[str | Path]) -> list[Result]:
    """Every saved result in or below the folders.

    Raises:
        ValueError: a folder without any; a result that this version cannot read.
    """
    results: list[Result] = []
    for path in map(Path, paths):
        files = sorted(path.rglob("info.json"))
        folders = [f.parent for f in files if not any(part.startswith(".") for part in f.relative_to(path).parts)]
        if not folders:
            raise ValueError(f"no result was saved in or below {path} (looked for info.json)")
        results += map(load_result, folders)
    return results


def write_report(results: Sequence[Result], path: str | Path, *, title: str | None = None) -> ReportFiles:
    """Write the page `path` (.html), the numbers beside it (.json), `claims.csv` and `tables/`. Each file is written
    aside and renamed.

    Args:
        results: of any evaluations, dictionaries, heads and models.
        title: heading of the page; by default it names the models.

    Raises:
        ValueError: there is no result.
    """
    if not results:
        raise ValueError("a report needs at least one result, found none")
    target, results = Path(path).with_suffix(".html"), in_order(results)
    rows = claim_rows(results)
    numbers = {
        "claims": [{"label": row.label, "paper": row.claim.paper, **vars(row.claim)} for row in rows],
        "quality": quality_rows(results),
        "results": [{"kind": r.kind, "settings": r.evaluation.to_dict(), "info": r.info} for r in results],
    }
    claims = pd.DataFrame(numbers["claims"], columns=["label", "paper", *Claim.__dataclass_fields__])
    for name, table in joined_tables(results).items():
        atomic_write(target.parent / "tables" / f"{name}.parquet", lambda f, t=table: t.to_parquet(f, index=False))
    atomic_csv(target.with_name("claims.csv"), claims.astype({"number": "Int64"}))
    beside = atomic_text(target.with_suffix(".json"), json.dumps(numbers, indent=1, allow_nan=False))
    atomic_text(target, _render(results, rows, title or _title(results), beside.name))
    return ReportFiles(target, beside)


def in_order(results: Sequence[Result]) -> list[Result]:
    """By kind as in `EVALUATIONS`; what could not be measured last; then dictionaries of writes first."""
    order = list(EVALUATIONS)
    return sorted(results, key=lambda r: (r.skipped is not None, order.index(r.kind), r.info.get("target") != "write"))


def claim_rows(results: Sequence[Result]) -> list[Answer]:
    """Every answer of trained dictionaries, held against their controls, by number of the paper's claim; this project's
    own claims after them."""
    return sorted(answers(in_order(results)), key=lambda row: row.claim.number or len(PAPER_CLAIMS) + 1)


def quality_rows(results: Sequence[Result]) -> list[dict[str, Json]]:
    """The quality of every dictionary that a result names, once each: the fields of `DictionaryQuality`, after
    model, head and dictionary."""
    rows: dict[tuple[Json, str, str], dict[str, Json]] = {}
    for result in results:
        place = result.info["model"], f"L{result.info['layer']}H{result.info['head']}"
        found = result.info.get("quality")
        for label, quality in found.items() if isinstance(found, Mapping) else ():
            if isinstance(quality, Mapping):
                rows[*place, label] = {"model": place[0], "head": place[1], "dictionary": label, **quality}
    return list(rows.values())


def joined_tables(results: Sequence[Result]) -> dict[str, pd.DataFrame]:
    """Each table of each kind over all results, with the columns label, layer and head (`of_label` and so on where the
    table has a column of that name)."""
    parts: dict[str, list[pd.DataFrame]] = {}
    for result in results:
        described = {"label": result.label, "layer": result.info["layer"], "head": result.info["head"]}
        for name, table in result.tables.items():
            new = {f"of_{k}" if k in table else k: v for k, v in described.items()}
            parts.setdefault(f"{result.kind}-{name}", []).append(table.assign(**new))
    return {name: pd.concat(tables, ignore_index=True) for name, tables in parts.items()}


def lead(rows: Sequence[Answer]) -> str:
    """The outcomes of all answers, counted."""
    counts = Counter(outcome_text(row.claim.outcome) for row in rows)
    said = ", ".join(f"{outcome} {n}" for outcome, n in counts.most_common())
    return f"Verdicts of {len(rows)} answers to claims: {said}. {multiplicity(rows)}".strip()


def multiplicity(rows: Sequence[Answer]) -> str:
    """How many of the answers with an interval would be wrong by luck. Nothing for fewer than two of them."""
    n = sum(re.search(r"\[[^]]*\d", row.claim.measured) is not None for row in rows)  # an interval of NaN is none
    if n < 2:
        return ""
    return (
        f"{n} of the answers have a 95% interval, without a correction for their number. If no effect existed at all, "
        f"the expected number of intervals that exclude chance on the side of the claim would be {ONE_SIDE * n:.2f}, "
        f"and the probability of at least one (for independent answers) {1 - (1 - ONE_SIDE) ** n:.2f}."
    )


def unanswered(rows: Sequence[Answer]) -> list[str]:
    """What the paper claims and nothing here answers, with what would."""
    answered = {row.claim.number for row in rows}
    by = {n: kind for kind, evaluation in EVALUATIONS.items() for n in evaluation.answers}
    where = {n: f" on {model}" for n, model in (OTHER_MODELS | {5: "several heads"}).items()}
    return [
        f"{n}. {claim.claim} (needs the evaluation {by[n]}{where.get(n, '')})"
        for n, claim in PAPER_CLAIMS.items()
        if n not in answered and n in by
    ]


class _Section(NamedTuple):
    """All results of one kind."""

    kind: str
    question: str
    description: str
    columns: dict[str, dict[str, str]]
    results: list[Result]

    def notes(self) -> list[str]:
        """What several results have to say alike."""
        first, *others = (result.notes() for result in self.results)
        return [note for note in first if others and all(note in notes for notes in others)]


def _render(results: Sequence[Result], rows: list[Answer], title: str, numbers: str) -> str:
    sections = []
    trained = [result for result in results if result.info.get("control") is None]  # tables/ has those of the controls
    for kind, group in itertools.groupby(trained, key=lambda r: r.kind if r.skipped is None else "skipped"):
        if kind == "skipped":
            sections.append(_Section(kind, "What could not be measured", "", {}, list(group)))
            continue
        evaluation: type[Evaluation] = EVALUATIONS[kind]
        description = inspect.getdoc(evaluation) or ""
        sections.append(_Section(kind, evaluation.question, description, evaluation.columns, list(group)))
    return (
        environment()
        .get_template("report.html")
        .render(
            title=title,
            lead=lead(rows),
            groups=_by_claim(rows),
            unanswered=unanswered(rows),
            numbers=numbers,
            sections=sections,
            rows_shown=_ROWS,
            facts=_facts(results),
            qualities=quality_rows(results),
            front=[figure for s in sections if s.kind != "skipped" for figure in EVALUATIONS[s.kind].front(s.results)],
        )
    )


def _by_claim(rows: list[Answer]) -> list[tuple[PaperClaim | None, list[Answer]]]:
    """Rows under the paper's claim that they answer; this project's own claims each under its own words."""

    def key(row: Answer) -> tuple[int, str]:
        return (row.claim.number, "") if row.claim.number else (len(PAPER_CLAIMS) + 1, row.claim.claim)

    groups = itertools.groupby(sorted(rows, key=key), key)
    return [(PAPER_CLAIMS.get(number_), list(group)) for (number_, _), group in groups]


def _title(results: Sequence[Result]) -> str:
    return f"What the atoms of {', '.join(dict.fromkeys(str(result.info['model']) for result in results))} do"


def _facts(results: Sequence[Result]) -> dict[str, str]:
    """What holds for the whole page: models, heads, dictionaries, time."""
    infos = [result.info for result in results]

    def listed(name: str) -> str:
        return ", ".join(dict.fromkeys(str(info[name]) for info in infos))

    seconds = sum(result.fact("seconds") for result in results if result.skipped is None)
    return {
        "model": listed("model"),
        "update rule": listed("rule"),
        "heads": ", ".join(dict.fromkeys(f"L{info['layer']}H{info['head']}" for info in infos)),
        "dtype": listed("dtype"),
        "architecture of the SAEs": listed("architecture"),
        "atoms": listed("d_sae"),
        "control dictionaries": ", ".join({str(i["control"]): 0 for i in infos if i.get("control") is not None})
        or "none",
        "evaluations took": f"{seconds:.0f} s",
    }
