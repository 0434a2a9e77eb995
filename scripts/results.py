"""docs/results.md and docs/dictionaries.md from the tables in docs/results, by the rules of today.

    python scripts/results.py          the pages (`make results`)
    python scripts/results.py FOLDER   first the tables, from the runs that `sh scripts/results.sh FOLDER` made

Their words are in `scripts/results`.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter, defaultdict
from itertools import product
from pathlib import Path
from typing import cast

import jinja2
import numpy as np
import pandas as pd
from tables import table

from writesae.evaluations import EVALUATIONS, load_result
from writesae.evaluations.bits import RIVAL, WAYS, Bits
from writesae.experiment.controls import answers
from writesae.experiment.evaluation import Result
from writesae.verdict.finding import said
from writesae.verdict.format import number, percent, points
from writesae.verdict.names import NAMES
from writesae.verdict.paper import PAPER_CLAIMS

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs"
RECIPES = {
    "paper": "BatchTopK, k 32",
    "paper-state": "BatchTopK, k 32, of states",
    "default": "TopK, k 1",
    "default-metric": "TopK, k 1, in the metric",
    "paper-last": "BatchTopK, k 32, last text",
    "default-last": "TopK, k 1, last text",
    "bits": "codes at equal bits",
    "bits-64": "codes at equal bits, 64",
}
"""Folders of runs, and what their dictionaries are called."""
UNREAD = ("kl_at", "kl_next", "reverse_kl_window", "reverse_kl_at", "reverse_kl_next", "norm")
"""Columns of substitution that no finding reads."""
FEW = 100
"""Different values in a column of measurements. A column with fewer may hold settings, and is saved as it is."""


def pack(runs: Path, folder: Path) -> None:
    """Join the tables of all saved results: a file for each table of each question, whose measurements have 14 bits,
    and one with a row for each result."""
    rows, parts = [], defaultdict(list)
    for n, file in enumerate(sorted(runs.glob("*/*/*/*/[!.]*/info.json"))):
        result = load_result(file.parent)
        about = (json.dumps(each) for each in (result.evaluation.to_dict(), result.info))
        rows.append([file.relative_to(runs).parts[0], result.kind, *about, result.skipped or ""])
        for name, each in result.tables.items():
            parts[f"{result.kind}-{name}"].append(each.drop(columns=[*UNREAD], errors="ignore").assign(result=n))
    parts["results"] = [pd.DataFrame(rows, columns=["recipe", "kind", "settings", "info", "skipped"])]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, tables in parts.items():
        joined = pd.concat(tables)
        floats = joined.select_dtypes("float").loc[:, lambda x: x.nunique() > FEW].astype("float32")
        joined[floats.columns] = ((floats.to_numpy().view("uint32") + 2**9) & np.uint32(2**32 - 2**10)).view("float32")
        ways = {"use_byte_stream_split": [*floats], "use_dictionary": [each for each in joined if each not in floats]}
        joined.to_parquet(folder / f"{name}.parquet", index=False, compression="zstd", compression_level=19, **ways)


def unpack(folder: Path) -> dict[str, list[Result]]:
    """Results by recipe; the label of each is "model;head"."""
    tables = {file.stem: pd.read_parquet(file) for file in folder.glob("*-*.parquet")}
    found: dict[str, list[Result]] = {recipe: [] for recipe in RECIPES}
    for n, (recipe, name, settings, about, skipped) in pd.read_parquet(folder / "results.parquet").iterrows():
        kind, info = EVALUATIONS[name], json.loads(about)
        info |= dict.fromkeys(("label", "control_of"), f"{info['model']};L{info['layer']}H{info['head']}")
        own = {
            each: (joined := tables[f"{name}-{each}"])[joined["result"] == n].reset_index(drop=True)
            for each in kind.columns
            if not skipped
        }
        found[recipe].append(Result(kind.from_dict(json.loads(settings)), info, own, skipped or None))
    return found


def strongest(controls: str) -> str:
    """The three controls of a claim that reach most, and control dictionaries."""
    return "; ".join(each for n, each in enumerate(controls.split("; ")) if n < 3 or "dictionary" in each)


def answered(found: dict[str, list[Result]], kind: str) -> list[list[str]]:
    """A row for each answer to a question: number of the claim, claim, model, head, dictionary, estimate, n, controls,
    verdict."""
    return sorted(
        [
            f"{claim.number:>2}" if claim.number else "–",
            claim.claim,
            *(label if ";" in label else f"several heads;{label}").split(";"),
            *(RECIPES[recipe], claim.measured, f"{claim.n:,} {claim.unit}", strongest(claim.controls), claim.outcome),
        ]
        for recipe, results in found.items()
        for label, claim in answers([each for each in results if each.kind == kind])
        if kind != "bits" or ";" not in label  # heads are in a table of their own
    )


def at_equal_bits(results: list[Result]) -> tuple[str, str]:
    """A table with a row for each code of writes: the median over heads of what it recovers by each fit. And one with a
    row for each head: the lead of the dictionary over the residual quantizer at each budget and fit. Each is the mean
    over the seeds of a head."""
    rows = []
    for test, result in ((cast(Bits, result.evaluation), result) for result in results):
        for budget, way in product(test.budgets, WAYS):
            kl, (ours, *others) = test.paired(result, budget, way)
            lead = kl.recovered(ours, than=f"{RIVAL} {budget // 16}").mean
            rows += [(result.label, budget, way, name, kl.recovered(name).mean, lead) for name in (ours, *others)]
    found = pd.DataFrame(rows, columns=["head", "bits", "way", "code", "share", "lead"])
    each_head = found.groupby(["bits", "code", "way", "head"])["share"].mean().groupby(level=["bits", "code", "way"])
    leads = found.pivot_table("lead", "head", ["bits", "way"])[list(product(found["bits"].unique(), WAYS))]
    of_codes = [
        [str(bits), code, *map(percent, own)] for (bits, code), own in each_head.median().unstack()[[*WAYS]].iterrows()
    ]
    of_heads = [[*str(head).split(";"), *own] for head, own in leads.map(points).replace("+nan", "–").iterrows()]
    fits = [f"{bits} bits, {way}" for bits, way in leads.columns]
    return table(["bits", "code", *WAYS], of_codes), table(["model", "head", *fits], of_heads)


def pages(folder: Path) -> dict[str, str]:
    """Both pages by name, from the tables in a folder."""
    words = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE / "results"), undefined=jinja2.StrictUndefined)
    words.globals |= {
        "table": table,
        "said": said,
        "number": number,
        "percent": percent,
        "recipes": RECIPES,
        "counts": lambda rows: Counter(row[-1] for row in rows).most_common(),
        "claims": PAPER_CLAIMS,
        "names": NAMES,
    }
    found = unpack(folder)
    bits = found["bits"] + found["bits-64"]
    questions = {each.question: answered(found, kind) for kind, each in EVALUATIONS.items()}
    return {
        name: words.get_template(name).render(found=found, questions=questions, bits=bits and at_equal_bits(bits))
        for name in ("results.md", "dictionaries.md")
    }


def main() -> None:
    """Write the pages, after the tables where a folder of runs is given."""
    for folder in sys.argv[1:]:
        pack(Path(folder) / "runs", DOCS / "results")
    for name, text in pages(DOCS / "results").items():
        (DOCS / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
