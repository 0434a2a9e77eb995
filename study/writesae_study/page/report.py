"""One page over everything that was evaluated: facts, dictionaries, then claims, controls and definitions.

The page is made from saved results alone. The same numbers are written to a JSON file of its name, and every table of
one kind, joined over dictionaries, to `tables/<kind>-<table>.parquet`.
"""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from textwrap import fill
from typing import cast

import pandas as pd

from hookpoints.files import atomic_text, atomic_write, finish
from writesae.files import GENERATOR, Json
from writesae.page.template import environment
from writesae_study.dictionary.controls import Answer, answers
from writesae_study.evaluations import EVALUATIONS, load_result
from writesae_study.experiment.evaluation import Result
from writesae_study.folders import check_page
from writesae_study.verdict.figures import Row
from writesae_study.verdict.finding import Figure, Finding, with_interval
from writesae_study.verdict.paper import PAPER_CLAIMS


def find_results(paths: Sequence[str | Path]) -> list[Result]:
    """Every saved result in or below the folders. Of one that cannot be read, the reason is printed.

    Raises:
        ValueError: a folder without any.
    """
    results = []
    for path in map(Path, paths):
        for aside in path.rglob(".*.aside"):
            finish(aside.parent)
        of_path = []
        for file in sorted(path.rglob("info.json")):
            parts = file.relative_to(path).parts
            # Results that are still being written are in hidden folders, and damaged ones were renamed.
            if not any(part.startswith(".") or ".damaged" in part for part in parts):
                try:
                    of_path.append(load_result(file.parent))
                except ValueError as error:
                    print(f"the page leaves out {file.parent}: {error}")
        if not of_path:
            raise ValueError(f"results: expected folders with saved results (info.json), got none in or below {path}")
        results += of_path
    return results


def write_report(results: Sequence[Result], path: str | Path) -> Path:
    """Write the page `path` (.html), its numbers (.json) and `tables/`; returns the page. Each file is written aside
    and renamed.

    Args:
        results: of any evaluations, dictionaries, heads and models.

    Raises:
        ValueError: there is no result, or a file of that name is there and is no page, or no numbers or table of one.
    """
    if not results:
        raise ValueError("results: expected at least one, got none")
    target = Path(path).with_suffix(".html")
    results = in_order(results)
    check_page(target)
    rows = claim_rows(results)
    numbers = {
        **GENERATOR,
        "claims": [{"label": row.label, "paper": row.claim.paper, **vars(row.claim)} for row in rows],
        "quality": quality_rows(results),
        "results": [{"kind": r.kind, "settings": r.evaluation.to_dict(), "info": r.info} for r in results],
    }
    # The page last: what it links to is there.
    for name, table in joined_tables(results).items():
        table.attrs |= GENERATOR  # in the file, so that it is known again
        atomic_write(target.parent / "tables" / f"{name}.parquet", lambda f, t=table: t.to_parquet(f, index=False))
    atomic_text(target.with_suffix(".json"), json.dumps(numbers, indent=1, allow_nan=False))
    models = ", ".join(dict.fromkeys(str(result.info["model"]) for result in results))
    template = environment("writesae_study").get_template("report.html")
    page = template.render(
        title=f"What the atoms of {models} do", numbers=f"{target.stem}.json", **_template_values(results, rows)
    )
    return atomic_text(target, page)


def in_order(results: Sequence[Result]) -> list[Result]:
    """By kind as in `EVALUATIONS`; what could not be measured last; then dictionaries of writes first."""
    kinds = list(EVALUATIONS)

    def place(result: Result) -> tuple[bool, int, bool]:
        return result.skipped is not None, kinds.index(result.kind), result.info.get("target") != "write"

    return sorted(results, key=place)


def claim_rows(results: Sequence[Result]) -> list[Answer]:
    """Every answer of trained dictionaries, compared with their controls, by number of the paper's claim; then this
    project's own claims."""
    return sorted(answers(in_order(results)), key=lambda row: row.claim.number or len(PAPER_CLAIMS) + 1)


def quality_rows(results: Sequence[Result]) -> list[dict[str, Json]]:
    """The quality of every dictionary that a result names, once each: model, head, dictionary, and the fields of
    `DictionaryQuality`."""
    rows: dict[tuple[Json, ...], dict[str, Json]] = {}
    for result in results:  # a dictionary is measured once, and all of its results say so
        model = result.info["model"]
        head = head_label(result)
        qualities = cast("dict[str, dict[str, Json]]", result.info.get("quality") or {})
        for label, quality in qualities.items():
            if quality:
                rows[model, head, label] = {"model": model, "head": head, "dictionary": label, **quality}
    return list(rows.values())


def head_label(result: Result) -> str:
    """Layer and head as a reader sees them: L4H0."""
    return f"L{result.info['layer']}H{result.info['head']}"


def joined_tables(results: Sequence[Result]) -> dict[str, pd.DataFrame]:
    """Each table of each kind over all results, with the columns label, layer and head (`of_label` and so on where the
    table has a column of that name)."""
    parts: dict[str, list[pd.DataFrame]] = {}
    for result in results:
        place = {"label": result.label, "layer": result.info["layer"], "head": result.info["head"]}
        for name, table in result.tables.items():
            columns = {f"of_{column}" if column in table else column: value for column, value in place.items()}
            parts.setdefault(f"{result.kind}-{name}", []).append(table.assign(**columns))
    return {name: pd.concat(tables, ignore_index=True) for name, tables in parts.items()}


def lead(results: Sequence[Result], rows: Sequence[Answer]) -> dict[str, object]:
    """What the page begins with: of the results of the first kind, the one with the largest effect, its first finding,
    the claim of it, and among how many it was chosen; empty where none shows a finding."""
    # The first finding of each result of the first kind, by its effect.
    candidates: list[tuple[float, Result, Finding]] = []
    for result in results:
        if result.kind != results[0].kind:
            continue
        first = next(iter(result.findings()), None)
        if first is not None and first.shown and first.effect:
            mean = first.effect.mean
            candidates.append((-mean if first.less else mean, result, first))
    if not candidates:
        return {}
    _, result, first = max(candidates, key=itemgetter(0))
    # The row's claim, and not the finding's: it was compared with control dictionaries.
    claim = next(row.claim for row in rows if row.label == result.label and row.claim.claim == first.claim)
    return {"result": result, "finding": first, "claim": claim, "n": len(candidates)}


def compared(results: Sequence[Result]) -> Iterator[Figure]:
    """For several results, a panel for each claim, with a row for each result."""
    if len(results) < 2:
        return
    by_claim: dict[str, list[tuple[str, Finding]]] = {}
    for result in results:
        label = fill(result.label, 26, max_lines=2, placeholder=" …")
        for finding in result.findings():
            if finding.shown:
                by_claim.setdefault(finding.claim, []).append((label, finding))
    for group in by_claim.values():
        rows = []
        for label, finding in group:
            colour = "control" if finding.verdict.unbeaten_controls else "atom"
            rows.append(Row(label, next(iter(finding.shown.values())), colour))
        _, finding = group[0]  # all have the same axis
        yield finding.figure(rows, "all dictionaries", "Orange: not shown to exceed every control.")


def _template_values(results: Sequence[Result], rows: Sequence[Answer]) -> dict[str, object]:
    """What the template shows of results and claims."""
    trained = [result for result in results if result.info.get("control") is None]  # tables/ has those of the controls
    # A section for each kind, and one for what could not be measured.
    sections: dict[str, list[Result]] = {}
    for result in trained:
        section = result.kind if result.skipped is None else "skipped"
        sections.setdefault(section, []).append(result)
    groups: dict[int | str, list[Answer]] = {}
    for row in rows:
        groups.setdefault(row.claim.number or row.claim.claim, []).append(row)
    return {
        "results": results,
        "lead": lead(trained, rows),
        "outcomes": Counter(row.claim.outcome for row in rows).most_common(),
        "groups": [(PAPER_CLAIMS.get(group[0].claim.number or 0), group) for group in groups.values()],
        "sections": sections,
        "compared": compared,
        "evaluations": EVALUATIONS,
        "documentation": inspect.getdoc,
        "heads": ", ".join(dict.fromkeys(map(head_label, results))),
        "qualities": quality_rows(results),
        "with_interval": with_interval,
    }
