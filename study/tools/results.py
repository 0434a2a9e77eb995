"""The pages results.md and dictionaries.md of study/docs from the tables in study/docs/results, by the rules of today.

    python study/tools/results.py          the pages (`make results`)
    python study/tools/results.py FOLDER   first the tables, from the runs of `writesae reproduce --published`

Their words are in `study/tools/results`.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

sys.path.append(str(Path(__file__).parents[2] / "tools"))

from tables import table

from writesae.page.format import number, percent
from writesae_study.dictionary.controls import answers
from writesae_study.evaluations import EVALUATIONS, load_result
from writesae_study.experiment.evaluation import Result, Scope
from writesae_study.reproduce.published import RUNS
from writesae_study.verdict.finding import Claim, with_interval
from writesae_study.verdict.names import NAMES
from writesae_study.verdict.paper import PAPER_CLAIMS

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs"
RECIPES = RUNS["names"]
"""Folders of runs, and what their dictionaries are called."""
NULLS = {folder: null["words"] for folder, null in RUNS["nulls"].items()}
"""The same of runs where nothing was learned."""
UNTRAINED = "random atoms, trained model"
"""The control dictionaries of trained ones, which are a third kind of run where no atom was learned."""
UNCONTROLLED = "no verdict"
"""Of a claim that holds for a dictionary whose run has no control dictionaries."""
Asked = tuple[str, str, str]
"""Number and words of a claim, and a model."""
ANSWER = ("number", "claim", "model", "head", "dictionary", "estimate", "n", "controls", "verdict")
"""Columns of an answer to a question."""
FEW = 100
"""Different values in a column of measurements. A column with fewer may hold settings, and is saved as it is."""


def pack(runs: Path, folder: Path) -> None:
    """Join the tables of all saved results: a file for each table of each question, whose measurements have 14 bits,
    and one with a row for each result. `rules` is then what the rules of today make of these tables."""
    rows, parts = [], defaultdict(list)
    for n, file in enumerate(sorted(runs.glob("*/*/*/*/[!.]*/info.json"))):
        result = load_result(file.parent)
        about = (json.dumps(each) for each in (result.evaluation.to_dict(), result.info))
        rows.append([file.relative_to(runs).parts[0], result.kind, *about, result.skipped or ""])
        for name, each in result.tables.items():
            parts[f"{result.kind}-{name}"].append(each.assign(result=n))
    parts["results"] = [pd.DataFrame(rows, columns=["recipe", "kind", "settings", "info", "skipped"])]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, tables in parts.items():
        joined = pd.concat(tables)
        floats = joined.select_dtypes("float").loc[:, lambda x: x.nunique() > FEW].astype("float32")
        joined[floats.columns] = ((floats.to_numpy().view("uint32") + 2**9) & np.uint32(2**32 - 2**10)).view("float32")
        ways = {"use_byte_stream_split": [*floats], "use_dictionary": [each for each in joined if each not in floats]}
        joined.to_parquet(folder / f"{name}.parquet", index=False, compression="zstd", compression_level=19, **ways)

    saved = pd.read_parquet(folder / "results.parquet")
    judged = (
        (result.info | {"rules": result.judged()} if not result.skipped else result.info)
        for _, result in packed(folder)
    )
    saved.assign(info=[json.dumps(info) for info in judged]).to_parquet(folder / "results.parquet", index=False)


def packed(folder: Path) -> list[tuple[str, Result]]:
    """Each result with its recipe, as it was saved."""
    tables = {file.stem: of_each_result(pd.read_parquet(file)) for file in folder.glob("*-*.parquet")}
    results = []
    for n, (recipe, name, settings, about, skipped) in pd.read_parquet(folder / "results.parquet").iterrows():
        kind = EVALUATIONS[name]
        own = {}
        for each in kind.columns if not skipped else ():
            own[each] = tables[f"{name}-{each}"][n].reset_index(drop=True)
        result = Result(kind.from_dict(json.loads(settings)), json.loads(about), own, skipped or None)
        results.append((recipe, result))
    return results


def of_each_result(joined: pd.DataFrame) -> Mapping[Any, pd.DataFrame]:
    """The rows of each result, by its number."""
    return defaultdict(lambda: joined.iloc[:0], iter(joined.groupby("result")))


def unpack(folder: Path) -> dict[str, list[Result]]:
    """Results by recipe; the label of each is "model;head"."""
    results: dict[str, list[Result]] = {recipe: [] for recipe in (*RECIPES, *NULLS)}
    for recipe, result in packed(folder):
        place = f"{result.info['model']};L{result.info['layer']}H{result.info['head']}"
        results[recipe].append(replace(result, info=result.info | dict.fromkeys(("label", "control_of"), place)))
    return results


def strongest(controls: str) -> str:
    """The three controls of a claim that reach most, and control dictionaries."""
    return "; ".join(each for n, each in enumerate(controls.split("; ")) if n < 3 or "dictionary" in each)


def answered(results: dict[str, list[Result]], kind: str) -> list[list[str]]:
    """A row for each answer to a question, with the columns of `ANSWER`."""
    return sorted(
        [
            f"{claim.number:>2}" if claim.number else "–",
            claim.claim,
            *(label if ";" in label else f"several heads;{label}").split(";"),
            *(RECIPES[recipe], claim.measured, f"{claim.n:,} {claim.unit}", strongest(claim.controls)),
            UNCONTROLLED if claim.outcome == "holds" and uncontrolled(kind, claim) else claim.outcome,
        ]
        for recipe in RECIPES
        for label, claim in answers([each for each in results[recipe] if each.kind == kind])
    )


def by_model(answers: list[list[str]]) -> str:
    """A table with a row for each claim and model: how many answers there are, and how many have which verdict."""
    verdicts = sorted({answer[-1] for answer in answers}, key=lambda verdict: (verdict != "holds", verdict))
    asked = defaultdict(Counter[str])
    for claim_number, claim, model, *_, verdict in answers:
        asked[claim_number, claim, model][verdict] += 1
    rows = [[*claim, counts.total(), *(counts[verdict] for verdict in verdicts)] for claim, counts in asked.items()]
    return table(["", "claim", "model", "answers", *verdicts], rows)


def uncontrolled(kind: str, claim: Claim) -> bool:
    """Whether no control dictionary was asked, where one could be."""
    return EVALUATIONS[kind].scope is not Scope.HEAD and "untrained dictionary (" not in claim.controls


def without_learning(results: dict[str, list[Result]], kind: str) -> dict[Asked, dict[str, list[bool]]]:
    """Whether each claim on each model holds in the runs where nothing was learned, by the kind of run."""
    held: dict[Asked, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for recipe, of_recipe in results.items():
        for result in of_recipe:
            name = NULLS.get(recipe) or (UNTRAINED if result.info.get("control") == "untrained" else None)
            if result.kind == kind and name is not None:
                for claim in result.claims():
                    number = f"{claim.number:>2}" if claim.number else "–"
                    held[number, claim.claim, str(result.info["model"])][name].append(claim.outcome == "holds")
    return held


def of_any_direction(kind: str, held: dict[str, list[bool]]) -> bool:
    """Whether a question asks no dictionary, or a claim holds in at least half of the runs of one kind in which nothing
    was learned."""
    return EVALUATIONS[kind].scope is Scope.HEAD or any(2 * sum(each) >= len(each) for each in held.values())


def pages(folder: Path) -> tuple[dict[str, str], pd.DataFrame]:
    """The pages of results and of dictionaries by name, from the tables in a folder; and all answers, one in a row."""
    nulls = [*NULLS.values(), UNTRAINED]
    words = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE / "results"), undefined=jinja2.StrictUndefined)
    words.globals |= {
        "table": table,
        "by_model": by_model,
        "with_interval": with_interval,
        "number": number,
        "percent": percent,
        "recipes": RECIPES,
        "nulls": nulls,
        "counts": lambda rows: Counter(row[-1] for row in rows).most_common(),
        "claims": PAPER_CLAIMS,
        "asked_by": {n: f"[{kind}](evaluations/{kind}.md)" for kind, each in EVALUATIONS.items() for n in each.answers},
        "names": NAMES,
    }
    results = unpack(folder)
    questions: dict[str, list[list[str]]] = {}
    anyhow: list[list[str]] = []
    evidence = []
    for kind, each in EVALUATIONS.items():
        rows, held = answered(results, kind), without_learning(results, kind)
        asked = {(number, claim, model): held[number, claim, model] for number, claim, model, *_ in rows}
        free = sorted(claim for claim, runs in asked.items() if of_any_direction(kind, runs))
        questions[each.question] = [row for row in rows if (row[0], row[1], row[2]) not in free]
        for claim in free:
            own = [row for row in rows if (row[0], row[1], row[2]) == claim]
            counts = [f"{sum(runs)} of {len(runs)}" if (runs := held[claim][name]) else "–" for name in nulls]
            evidence.append(
                [*claim, f"{sum(row[-1] in ('holds', UNCONTROLLED) for row in own)} of {len(own)}", *counts]
            )
            anyhow += own
    rendered = {
        name: words.get_template(name).render(
            results=results,
            questions=questions,
            anyhow=anyhow,
            evidence=evidence,
        )
        for name in ("results.md", "dictionaries.md")
    }
    every = [[question, *row] for question, rows in questions.items() for row in rows]
    every += [["any direction", *row] for row in anyhow]
    return rendered, pd.DataFrame(every, columns=["question", *ANSWER])


def main() -> None:
    """Write the pages, after the tables where a folder of runs is given."""
    for folder in sys.argv[1:]:
        pack(Path(folder) / "runs", DOCS / "results")
    rendered, every = pages(DOCS / "results")
    every.to_parquet(DOCS / "results" / "answers.parquet", index=False, compression="zstd", compression_level=19)
    for name, text in rendered.items():
        (DOCS / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
