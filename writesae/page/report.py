"""One page over everything that was evaluated: claim, the paper's value, the value here, controls, verdict; then why.

The page is made from saved results alone. Beside it are the same numbers: a JSON file of its name, and every table of
one kind joined over dictionaries in `tables/<kind>-<table>.parquet`.
"""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from sae_lens_writesae.files import atomic_text, atomic_write
from writesae.evaluations import EVALUATIONS, load_result
from writesae.experiment.controls import Answer, answers
from writesae.experiment.evaluation import Result
from writesae.files import Json
from writesae.page.template import environment, outcome_text
from writesae.verdict.paper import PAPER_CLAIMS, PaperClaim


def find_results(paths: Sequence[str | Path]) -> list[Result]:
    """Every saved result in or below the folders.

    Raises:
        ValueError: a folder without any; a result that this version cannot read.
    """
    folders = list[Path]()
    for path in map(Path, paths):
        below = [file.parent for file in sorted(path.rglob("info.json"))]
        found = [each for each in below if not any(part.startswith(".") for part in each.relative_to(path).parts)]
        if not found:
            raise ValueError(f"results: expected folders with saved results (info.json), got none in or below {path}")
        folders += found
    return [load_result(folder) for folder in folders]


def write_report(
    results: Sequence[Result], path: str | Path, *, title: str | None = None, opening: Sequence[Mapping[str, str]] = ()
) -> Path:
    """Write the page `path` (.html), the numbers beside it (.json), and `tables/`; returns the page. Each file is
    written aside and renamed.

    Args:
        results: of any evaluations, dictionaries, heads and models.
        title: heading of the page; by default it names the models.
        opening: panels above all else, with the fields `title`, `example`, `sentence` and `svg`.

    Raises:
        ValueError: there is no result.
    """
    if not results:
        raise ValueError("a report needs at least one result, found none")
    target, results = Path(path).with_suffix(".html"), in_order(results)
    rows = claim_rows(results)
    title = title or f"What the atoms of {', '.join(dict.fromkeys(str(r.info['model']) for r in results))} do"
    numbers = {
        "claims": [{"label": row.label, "paper": row.claim.paper, **vars(row.claim)} for row in rows],
        "quality": quality_rows(results),
        "results": [{"kind": r.kind, "settings": r.evaluation.to_dict(), "info": r.info} for r in results],
    }
    for name, table in joined_tables(results).items():
        atomic_write(target.parent / "tables" / f"{name}.parquet", lambda f, t=table: t.to_parquet(f, index=False))
    beside = atomic_text(target.with_suffix(".json"), json.dumps(numbers, indent=1, allow_nan=False))
    return atomic_text(target, _render(results, rows, title, beside.name, opening))


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
            table = table.assign(**{f"of_{k}" if k in table else k: v for k, v in described.items()})
            parts.setdefault(f"{result.kind}-{name}", []).append(table)
    return {name: pd.concat(tables, ignore_index=True) for name, tables in parts.items()}


def _render(
    results: Sequence[Result], rows: list[Answer], title: str, numbers: str, opening: Sequence[Mapping[str, str]]
) -> str:
    trained = [result for result in results if result.info.get("control") is None]  # tables/ has those of the controls
    sections: dict[str, list[Result]] = {}
    for result in trained:
        sections.setdefault(result.kind if result.skipped is None else "skipped", []).append(result)
    shared = {  # what several results have to say alike
        kind: [note for note in group[0].notes() if len(group) > 1 and all(note in each.notes() for each in group)]
        for kind, group in sections.items()
    }
    return (
        environment()
        .get_template("report.html")
        .render(
            title=title,
            opening=opening,
            outcomes=Counter(outcome_text(row.claim.outcome) for row in rows).most_common(),
            n_answers=len(rows),
            # an interval of NaN is none
            n_intervals=sum(re.search(r"\[[^]]*\d", row.claim.measured) is not None for row in rows),
            groups=_by_claim(rows),
            numbers=numbers,
            sections=sections,
            shared=shared,
            evaluations=EVALUATIONS,
            documentation=inspect.getdoc,
            facts=_facts(results),
            qualities=quality_rows(results),
        )
    )


def _by_claim(rows: list[Answer]) -> list[tuple[PaperClaim | None, list[Answer]]]:
    """Rows under the paper's claim that they answer; this project's own claims each under its own words."""
    groups: dict[object, list[Answer]] = {}
    for row in rows:  # by number already
        groups.setdefault(row.claim.number or row.claim.claim, []).append(row)
    return [(PAPER_CLAIMS.get(group[0].claim.number or 0), group) for group in groups.values()]


def _facts(results: Sequence[Result]) -> dict[str, str]:
    """What holds for the whole page: models, heads, dictionaries, time."""
    names = {
        "model": "model",
        "update rule": "rule",
        "heads": "cell",
        "dtype": "dtype",
        "architecture of the SAEs": "architecture",
        "atoms": "d_sae",
        "control dictionaries": "control",
    }
    infos = [result.info | {"cell": f"L{result.info['layer']}H{result.info['head']}"} for result in results]
    known = {name: dict.fromkeys(str(i[key]) for i in infos if i.get(key) is not None) for name, key in names.items()}
    seconds = sum(result.fact("seconds") for result in results if result.skipped is None)
    return {name: ", ".join(each) or "none" for name, each in known.items()} | {"evaluations took": f"{seconds:.0f} s"}
