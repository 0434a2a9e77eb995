"""One page over everything that was evaluated: a picture and three sentences, then claims, controls and definitions.

The page is made from saved results alone. The same numbers are written to a JSON file of its name, and every table of
one kind, joined over dictionaries, to `tables/<kind>-<table>.parquet`.
"""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from textwrap import fill
from typing import cast

import pandas as pd

from hookpoints.files import atomic_text, atomic_write
from writesae.evaluations import EVALUATIONS, load_result
from writesae.experiment.controls import Answer, answers
from writesae.experiment.evaluation import Result
from writesae.files import GENERATOR, Json, check_ours
from writesae.page.template import environment
from writesae.verdict.figures import Row, intervals
from writesae.verdict.finding import Figure, Finding, said
from writesae.verdict.paper import PAPER_CLAIMS


def find_results(paths: Sequence[str | Path]) -> list[Result]:
    """Every saved result in or below the folders.

    Raises:
        ValueError: a folder without any; a result that this version cannot read.
    """
    folders = list[Path]()
    for path in map(Path, paths):
        found = [
            file.parent
            for file in sorted(path.rglob("info.json"))
            if not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        if not found:
            raise ValueError(f"results: expected folders with saved results (info.json), got none in or below {path}")
        folders += found
    return [load_result(folder) for folder in folders]


@dataclass(frozen=True)
class Opening:
    """A panel at the beginning of a page, as data: its picture is drawn when the page is written."""

    title: str
    example: str
    sentence: str
    """Markdown without HTML."""
    axis: str
    rows: tuple[tuple[str, float, float, float], ...]
    """Name, share, and both ends of its interval: first the atom, then its controls."""

    def panel(self) -> str:
        """An SVG element. Orange: a control that the atom is not shown to exceed."""
        drawn = [
            Row(*row, "atom" if n == 0 else "control" if row[3] >= self.rows[0][2] else "soft")
            for n, row in enumerate(self.rows)
        ]
        return intervals(drawn, self.axis, self.title, write=lambda share: f"{share:.0%}")


def write_report(
    results: Sequence[Result], path: str | Path, *, title: str | None = None, opening: Sequence[Opening] = ()
) -> Path:
    """Write the page `path` (.html), its numbers (.json) and `tables/`; returns the page. Each file is written aside
    and renamed.

    Args:
        results: of any evaluations, dictionaries, heads and models.
        title: heading of the page; by default it names the models.
        opening: panels after the first picture.

    Raises:
        ValueError: there is no result, or a file of that name is there and is no page or no numbers of one.
    """
    if not results:
        raise ValueError("results: expected at least one, got none")
    target, results = Path(path).with_suffix(".html"), in_order(results)
    check_ours(target, target.with_suffix(".json"))
    rows = claim_rows(results)
    numbers = {
        **GENERATOR,
        "claims": [{"label": row.label, "paper": row.claim.paper, **vars(row.claim)} for row in rows],
        "quality": quality_rows(results),
        "results": [{"kind": r.kind, "settings": r.evaluation.to_dict(), "info": r.info} for r in results],
    }
    for name, table in joined_tables(results).items():
        atomic_write(target.parent / "tables" / f"{name}.parquet", lambda f, t=table: t.to_parquet(f, index=False))
    atomic_text(target.with_suffix(".json"), json.dumps(numbers, indent=1, allow_nan=False))
    shown = _shown(results, rows) | {
        "title": title or f"What the atoms of {', '.join(dict.fromkeys(str(r.info['model']) for r in results))} do",
        "opening": opening,
        "numbers": f"{target.stem}.json",
    }
    return atomic_text(target, environment().get_template("report.html").render(shown))


def in_order(results: Sequence[Result]) -> list[Result]:
    """By kind as in `EVALUATIONS`; what could not be measured last; then dictionaries of writes first."""
    return sorted(
        results,
        key=lambda r: (r.skipped is not None, list(EVALUATIONS).index(r.kind), r.info.get("target") != "write"),
    )


def claim_rows(results: Sequence[Result]) -> list[Answer]:
    """Every answer of trained dictionaries, compared with their controls, by number of the paper's claim; then this
    project's own claims."""
    return sorted(answers(in_order(results)), key=lambda row: row.claim.number or len(PAPER_CLAIMS) + 1)


def quality_rows(results: Sequence[Result]) -> list[dict[str, Json]]:
    """The quality of every dictionary that a result names, once each: model, head, dictionary, and the fields of
    `DictionaryQuality`."""
    rows = {
        (*place, label): {"model": place[0], "head": place[1], "dictionary": label, **quality}
        for result in results
        for place in [(result.info["model"], head_of(result))]
        for label, quality in cast("dict[str, dict[str, Json]]", result.info.get("quality") or {}).items()
        if quality
    }
    return list(rows.values())


def head_of(result: Result) -> str:
    """Layer and head as a reader sees them: L4H0."""
    return f"L{result.info['layer']}H{result.info['head']}"


def joined_tables(results: Sequence[Result]) -> dict[str, pd.DataFrame]:
    """Each table of each kind over all results, with the columns label, layer and head (`of_label` and so on where the
    table has a column of that name)."""
    tables = [
        (f"{r.kind}-{name}", table.assign(**{f"of_{k}" if k in table else k: v for k, v in place.items()}))
        for r in results
        for place in [{"label": r.label, "layer": r.info["layer"], "head": r.info["head"]}]
        for name, table in r.tables.items()
    ]
    return {name: pd.concat([t for n, t in tables if n == name], ignore_index=True) for name in dict(tables)}


def lead(results: Sequence[Result], rows: Sequence[Answer]) -> dict[str, object]:
    """What the page begins with: of the results of the first kind, the one with the largest effect, its first finding,
    the claim of it, and among how many it was chosen; empty where none shows a finding."""
    found = [
        (-f.effect.mean if f.less else f.effect.mean, r, f)
        for r in results
        for f in r.findings()[:1]
        if f.shown and f.effect and r.kind == results[0].kind
    ]
    if not found:
        return {}
    _, result, first = max(found, key=itemgetter(0))
    claim = next(row.claim for row in rows if (row.label, row.claim.claim) == (result.label, first.claim))
    return {"result": result, "finding": first, "claim": claim, "n": len(found)}


def compared(results: Sequence[Result]) -> Iterator[Figure]:
    """For several results, a panel for each claim, with a row for each result."""
    found: dict[str, list[tuple[str, Finding]]] = {}
    for result, finding in ((r, f) for r in results for f in r.findings() if f.shown and len(results) > 1):
        found.setdefault(finding.claim, []).append((fill(result.label, 26, max_lines=2, placeholder=" …"), finding))
    for claim, group in found.items():
        rows = [
            Row(label, *next(iter(each.shown.values()))[:3], "control" if each.verdict.unbeaten_controls else "atom")
            for label, each in group
        ]
        how = {name: getattr(group[0][1], name) for name in ("chance", "write", "least")}
        svg = intervals(rows, group[0][1].axis, f"{claim}: all dictionaries", **how)
        yield Figure(claim[0].upper() + claim[1:], svg, "Orange: not shown to exceed every control.")


def _shown(results: Sequence[Result], rows: Sequence[Answer]) -> dict[str, object]:
    """What the template shows of results and claims."""
    trained = [result for result in results if result.info.get("control") is None]  # tables/ has those of the controls
    sections = {
        kind: list(group) for kind, group in groupby(trained, key=lambda r: r.kind if r.skipped is None else "skipped")
    }
    numbered = {row.claim.number or row.claim.claim: PAPER_CLAIMS.get(row.claim.number or 0) for row in rows}
    return {
        "results": results,
        "lead": lead(trained, rows),
        "outcomes": Counter(row.claim.outcome for row in rows).most_common(),
        "n_answers": len(rows),
        # an interval of NaN is none
        "n_intervals": sum(re.search(r"\[[^]]*\d", row.claim.measured) is not None for row in rows),
        "groups": [
            (paper, [r for r in rows if (r.claim.number or r.claim.claim) == key]) for key, paper in numbered.items()
        ],
        "sections": sections,
        "shared": {  # what several results have to say alike
            kind: [note for note in group[0].notes() if len(group) > 1 and all(note in each.notes() for each in group)]
            for kind, group in sections.items()
        },
        "compared": compared,
        "evaluations": EVALUATIONS,
        "documentation": inspect.getdoc,
        "heads": ", ".join(dict.fromkeys(map(head_of, results))),
        "qualities": quality_rows(results),
        "said": said,
    }
