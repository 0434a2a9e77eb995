"""Write docs/dictionaries.md and docs/results.md from their data, docs/dictionaries.jsonl and docs/results.jsonl.

    python scripts/findings.py
    python scripts/findings.py FOLDER ...    docs/results.jsonl is made before, from results that `writesae reproduce`,
                                             `eval` or `demo` saved in or below the folders

A line of dictionaries.jsonl is one dictionary: its quality on whole sequences, and sums of KL by sequence. A line of
results.jsonl is one answer.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tables import table

from writesae.experiment.head_baselines import BASELINES
from writesae.page.report import claim_rows, find_results
from writesae.verdict.names import NAMES
from writesae.verdict.paper import PAPER_CLAIMS
from writesae.verdict.statistics import Estimate, recovered_difference, recovered_share

DOCS = Path(__file__).resolve().parents[1] / "docs"
DICTIONARIES, RESULTS = DOCS / "dictionaries.md", DOCS / "results.md"
Line = Mapping[str, Any]
Cell = tuple[str, str]
"""Model and head."""
Value = Estimate | float | str | None
FAMILIES = {"embedded": "Gated DeltaNet", "embedded-mamba2": "Mamba-2", "embedded-rwkv7": "RWKV-7"}
OPTIONS = (
    ("the metric", "k 1, metric", "k 1"),
    ("product codes", "product", "k 1"),
    ("product codes, both in the metric", "product, metric", "k 1, metric"),
)
"""What is compared with what, at equal parameters and one active atom."""
KS, MARKS = ("k 1", "k 2", "k 4", "k 32"), ("", " metric")
"""Recipes by their active atoms, and what follows the name of one: nothing, or that it is in the metric."""
RECIPES = ("random start", "500 steps", "not centred", "lr 1e-3", "64 atoms", "1024 atoms")

DICTIONARIES_HEAD = """# What a dictionary of writes is worth

How far a trained atom exceeds what needs no training, and where the model's own metric pays. On each head, 48
held-out sequences of 128 tokens with 6 positions each: the write is replaced, and the KL divergence
from the native next-token distributions is averaged over the 16 tokens after it. The *recovered share* is
1 - sum KL / sum KL(deletion). All dictionaries are `writesae_topk` with 256 atoms, 2000 steps of 128 writes at a
learning rate of 0.003, and start from native writes, unless the name says otherwise. The heads are those whose writes
do most in each of the three models of the package, at most two of a layer. The numbers, `docs/dictionaries.jsonl`, were
measured on 2026-11-26; `scripts/findings.py` writes this page from them."""

DICTIONARIES_FOOT = """A dash: not measured. Intervals are over sequences; of a head with several seeds, the mean over
its seeds is compared, and the seeds stand beside it. Defaults of `training_config` are those of k 1.
"""

RESULTS_HEAD = """# Results on the models of the package

What was evaluated on 2026-11-26, with the verdict that [one ladder of rules](verdicts.md) gives; a dash says that
nothing here answers the claim. No control dictionaries were run: a claim that holds here may hold for an untrained
dictionary too. The models have 2.3 to 2.4 M parameters, and the dictionaries are small and trained for a minute at
most. A claim that fails here may hold on the models of the paper: this page shows what the tests measure and that
claims can fail them, and not that the paper is wrong. `writesae reproduce` runs the same on a real model.
`scripts/findings.py` makes the page from `docs/results.jsonl`, or from saved results."""


class Study:
    """The lines of dictionaries.jsonl, by head, recipe and seed."""

    def __init__(self, lines: Iterable[Line]):
        self.of: dict[tuple[str, str, str], dict[int, Line]] = defaultdict(dict)
        for x in lines:
            self.of[x["model"], x["cell"], x["recipe"]][x["seed"]] = x
        self.cells: list[Cell] = list(dict.fromkeys((model, cell) for model, cell, _ in self.of))

    def kl(self, cell: Cell, recipe: str, condition: str, seeds: Iterable[int] | None = None) -> np.ndarray:
        """Sums of KL by sequence, mean over seeds."""
        lines = self.of[*cell, recipe]
        return np.mean([lines[s]["kl"][condition] for s in seeds or lines if condition in lines[s]["kl"]], axis=0)

    def share(self, recipe: str, condition: str, cell: Cell) -> Estimate:
        """Recovered share of a recipe's atom or code, or of a baseline."""
        deleted = self.kl(cell, recipe, "delete")
        return recovered_share(self.kl(cell, recipe, condition), deleted, np.arange(len(deleted)))

    def lead(self, a: str, b: str, cell: Cell) -> Estimate:
        """Share of the atom of recipe ``a`` minus that of ``b``, over the seeds that both have."""
        both = sorted(self.of[*cell, a].keys() & self.of[*cell, b].keys())
        deleted = self.kl(cell, a, "delete")
        ours, other = (self.kl(cell, recipe, "atom", both) for recipe in (a, b))
        return recovered_difference(ours, other, deleted, np.arange(len(deleted)))

    def mean(self, recipe: str, field: str, cell: Cell) -> float:
        """Mean over seeds of a number of the lines; of "stream", its point estimate."""
        values = [line[field] for line in self.of[*cell, recipe].values()]
        return float(np.mean([value[0] if field == "stream" else value for value in values]))

    def counts(self, a: str, b: str) -> tuple[int, int, int]:
        """On how many heads the interval of a's lead over b lies above 0, and below 0, and the number of heads."""
        leads = [self.lead(a, b, cell) for cell in self.cells]
        return sum(x.low > 0 for x in leads), sum(x.high < 0 for x in leads), len(leads)

    def per_head(self, columns: Mapping[str, Callable[[Cell], Value]]) -> str:
        """A table with one row for each head."""
        rows = [(name_of(cell), *(shown(value(cell)) for value in columns.values())) for cell in self.cells]
        return table(("head", *columns), rows)


def name_of(cell: Cell) -> str:
    """A head as the tables name it."""
    return f"{cell[0].removeprefix('embedded').removeprefix('-') or 'gdn'} {cell[1]}"


def shown(value: Value) -> str:
    """A share in percent, with its interval where it has one."""
    if isinstance(value, Estimate):
        return f"{100 * value.mean:.0f} [{100 * value.low:.0f}, {100 * value.high:.0f}]"
    return f"{100 * value:.0f}" if isinstance(value, float) else str(value or "")


def summary(study: Study) -> str:
    """The numbers over all heads."""
    rows = []
    for recipe in dict.fromkeys(recipe for _, _, recipe in study.of):
        n = sum(len(study.of[*cell, recipe]) for cell in study.cells)
        atoms = np.median([study.share(recipe, "atom", cell).mean for cell in study.cells])
        streams = np.median([study.mean(recipe, "stream", cell) for cell in study.cells])
        rows.append((recipe, n, len(study.cells), shown(float(atoms)), shown(float(streams))))
    for name in BASELINES:
        shares = np.median([study.share("k 1", name, cell).mean for cell in study.cells])
        rows.append((NAMES[name], "", len(study.cells), shown(float(shares)), ""))
    medians = (f"{what}, median over heads" for what in ("one atom", "whole stream"))
    return f"## Summary\n\n{table(('what is written', 'dictionaries', 'heads', *medians), rows)}"


def by_family(study: Study) -> str:
    """Where the metric and product codes pay: one row for each option and family."""
    rows, pays, harms = [], [], []
    for title, a, b in OPTIONS:
        for model, family in FAMILIES.items():
            cells = [cell for cell in study.cells if cell[0] == model]
            leads = [study.lead(a, b, cell) for cell in cells]
            stream = np.median([study.mean(a, "stream", cell) - study.mean(b, "stream", cell) for cell in cells])
            above, below = sum(x.low > 0 for x in leads), sum(x.high < 0 for x in leads)
            middle = f"{100 * np.median([x.mean for x in leads]):+.0f}"
            rows.append((title, family, len(leads), middle, above, below, f"{100 * stream:+.0f}"))
            pays += [f"{title} on {family}"] * bool(above > below and stream > 0)
            harms += [f"{title} on {family}"] * bool(below > above and stream < 0)
    head = ("option", "model", "heads", "one atom, median lead (points)", "interval above 0", "below 0")
    return f"""## Which wins, and where not

Leads over `writesae_topk` with as many parameters and one active atom too: over squared errors, or where it says so
over the metric. It pays, which is to say that more intervals lie above 0 than below it and that the whole stream gains,
with **{"; ".join(pays) or "nothing"}**. It makes things worse with **{"; ".join(harms) or "nothing"}**. As no option
wins everywhere, try them on a head of your own: `dictionary_quality` tells.

{table((*head, "whole stream, median lead"), rows)}"""


def one_atom(study: Study) -> str:
    """One atom compared with what needs no training."""

    def trained(cell: Cell) -> str:
        seeds = [line["kl"] for line in study.of[*cell, "k 1"].values()]
        means = [recovered_share(kl["atom"], kl["delete"], range(48)).mean for kl in seeds]
        return f"{shown(study.share('k 1', 'atom', cell))} ({'/'.join(map(shown, means))})"

    names = ("token_mean", "pair_mean", "quantised")
    atoms = {cell: study.share("k 1", "atom", cell).mean for cell in study.cells}
    ahead = [sum(atoms[cell] > study.share("k 1", name, cell).mean for cell in study.cells) for name in names]
    columns: dict[str, Callable[[Cell], Value]] = {
        "nats of deleting all": lambda cell: f"{study.mean('k 1', 'deleted', cell):.4f}",
        "atom, k 1 (by seed)": trained,
        "drawn writes as a dictionary": partial(study.share, "native writes", "atom"),
        "untrained": partial(study.share, "untrained", "atom"),
        **{NAMES[name]: lambda cell, name=name: study.share("k 1", name, cell).mean for name in BASELINES},
    }
    return f"""## What one atom is worth

Share of a deletion's effect that one atom recovers, in percent, with its interval over sequences. By point estimates,
the atom is ahead of the mean write of the token on {ahead[0]} of {len(atoms)} heads, of the token pair on {ahead[1]},
and on {ahead[2]} of the vector quantiser, which picks one of 256 rank-1 directions and scales it to the write.
The terms are not equal: what needs no training is fitted by squared errors, on 16,384 of the
122,624 writes that a dictionary sees. On equal terms a vector quantiser does as well as an atom.

{study.per_head(columns)}"""


def metric(study: Study) -> str:
    """Squared errors and the Gauss-Newton metric."""
    above, below, n = study.counts("k 1, metric", "k 1")
    explained = partial(study.mean, field="explained")
    lower = sum(explained("k 1, metric", cell=cell) < explained("k 1", cell=cell) for cell in study.cells)
    columns: dict[str, Callable[[Cell], Value]] = {
        "one atom, squares": partial(study.share, "k 1", "atom"),
        "one atom, metric": partial(study.share, "k 1, metric", "atom"),
        "gain at k 1": partial(study.lead, "k 1, metric", "k 1"),
        "gain at k 4": partial(study.lead, "k 4, metric", "k 4"),
        **{
            f"whole stream, {k}{m}": partial(study.mean, k + "," * bool(m) + m, "stream")
            for k in KS[::2]
            for m in MARKS
        },
        "explained variance, squares": lambda cell: f"{study.mean('k 1', 'explained', cell):.2f}",
        "metric": lambda cell: f"{study.mean('k 1, metric', 'explained', cell):.2f}",
    }
    return f"""## The model's own metric

`metric="gauss_newton"` measures the error of a write by the KL divergence that it causes. At k 1 the interval of the
gain lies above 0 on {above} of {n} heads, below 0 on {below}, and reaches 0 on the others. Explained variance
is lower in the metric on {lower} of {n} heads, whether the effect grows there or not.

{study.per_head(columns)}"""


def sparsity(study: Study) -> str:
    """k 1, 2, 4, 32."""
    columns: dict[str, Callable[[Cell], Value]] = {
        **{f"one atom, {k}": partial(study.share, k, "atom") for k in KS},
        **{f"code, {k}": lambda cell, k=k: study.share(k, "code", cell).mean for k in KS},
        **{f"stream, {k}": partial(study.mean, k, "stream") for k in KS},
    }
    return f"""## How many atoms

One atom of the code, the whole code at one position, and the whole stream (every write of the head replaced at once),
in percent of what deletion does.

{study.per_head(columns)}"""


def product(study: Study) -> str:
    """Product codes and rank-1 atoms with as many parameters and one active latent."""
    pairs = {
        "product - k 1, squares": ("product", "k 1"),
        "product - k 1, both in the metric": ("product, metric", "k 1, metric"),
        "product in the metric - k 1 in squares": ("product, metric", "k 1"),
    }
    said = ["{0} of {2} heads above 0 and on {1} below".format(*study.counts(*pair)) for pair in pairs.values()]
    recipes = {"k 1, metric": "k 1, metric", "product, squares": "product", "product, metric": "product, metric"}
    columns: dict[str, Callable[[Cell], Value]] = {
        **{title: partial(study.share, name, "atom") for title, name in recipes.items()},
        **{title: partial(study.lead, *pair) for title, pair in pairs.items()},
        **{f"whole stream: {title}": partial(study.mean, name, "stream") for title, name in recipes.items()},
    }
    return f"""## Product codes

`writesae_product` has 256 key atoms and 256 value atoms, one of each active, and with them
the parameters of 256 rank-1 atoms; its atoms are all pairs. The interval of its lead over k 1 lies, with
squared errors in both, on {said[0]}; with the metric in both, on {said[1]}; and in the metric against k 1 in squares,
on {said[2]}.

{study.per_head(columns)}"""


def recipes(study: Study) -> str:
    """Start, steps, centring and size, as differences from k 1."""
    found = {name: study.counts(f"k 1, {name}", "k 1") for name in RECIPES}
    said = [f"{name}: better on {a}, worse on {b} of {n} heads" for name, (a, b, n) in found.items()]
    columns: dict[str, Callable[[Cell], Value]] = {
        **{f"{name}: one atom": partial(study.lead, f"k 1, {name}", "k 1") for name in RECIPES},
        "stream, k 1": partial(study.mean, "k 1", "stream"),
        **{f"stream, {name}": partial(study.mean, f"k 1, {name}", "stream") for name in RECIPES},
    }
    return f"""## Other recipes

Percentage points of one atom's recovered share against k 1 (native start, 2000 steps at 0.003,
centred, 256 atoms), same seeds; then the whole stream. By intervals that do not reach 0:
{"; ".join(said)}.

{study.per_head(columns)}"""


def dictionaries_page(lines: Iterable[Line]) -> str:
    """docs/dictionaries.md."""
    sections = (summary, by_family, one_atom, metric, sparsity, product, recipes)
    text = [section(Study(lines)).rstrip() for section in sections]
    return "\n\n".join([DICTIONARIES_HEAD, *text, DICTIONARIES_FOOT])


def answers(folders: Iterable[Path]) -> list[Line]:
    """Every answer that was saved in or below the folders, model by model."""
    models = defaultdict(list)
    for result in find_results(list(folders)):
        models[str(result.info["model"])].append(result)
    found = [(model, row.label, row.claim) for model, results in models.items() for row in claim_rows(results)]
    return [
        {
            "number": claim.number,
            "claim": claim.claim,
            "model": model,
            "dictionary": label,
            "value": claim.measured,
            "verdict": claim.outcome,
            "why": f"{claim.sentence} n: {claim.n:,} {claim.unit}."
            + (f" controls: {claim.controls}." if claim.controls else ""),
        }
        for model, label, claim in found
    ]


def results_page(lines: Iterable[Line]) -> str:
    """docs/results.md: verdicts by model, then a table for each claim."""
    by_claim, models = defaultdict(list), list(dict.fromkeys(line["model"] for line in lines))
    for line in lines:
        by_claim[line["number"] or line["claim"]].append(line)
    verdicts, tables = [], []
    for number, claim in PAPER_CLAIMS.items():
        counts = [Counter(x["verdict"] for x in by_claim.get(number, ()) if x["model"] == model) for model in models]
        verdicts.append((number, claim.claim, *(", ".join(f"{n} {v}" for v, n in c.most_common()) for c in counts)))
    for _, found in sorted(by_claim.items(), key=lambda item: item[0] if item[0] in PAPER_CLAIMS else 99):
        rows = [(f"{x['model']} {x['dictionary']}", x["value"], x["verdict"], x["why"]) for x in found]
        title = f"{found[0]['number']}. {found[0]['claim']}" if found[0]["number"] else found[0]["claim"]
        answered = table(("dictionary", "value here", "verdict", "why"), rows)
        tables.append(f'### {title}\n\n<div class="sorted" markdown="1">\n\n{answered}\n</div>')
    head = table(("", "claim", *(f"`{model}`" for model in models)), verdicts)
    return "\n\n".join(
        [
            RESULTS_HEAD,
            f"## Verdicts\n\nHow many answers had which verdict.\n\n{head.rstrip()}",
            "## Answers\n\nClick a heading to sort. A box filters: `holds vector` keeps the rows with both words.",
            *tables,
            "",
        ]
    )


def read(page: Path) -> list[Line]:
    """The data of a page."""
    return [json.loads(line) for line in page.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()]


def main(folders: list[Path]) -> None:
    """Write both pages."""
    if folders:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in answers(folders))
        RESULTS.with_suffix(".jsonl").write_text("".join(lines), encoding="utf-8")
    RESULTS.write_text(results_page(read(RESULTS)), encoding="utf-8")
    DICTIONARIES.write_text(dictionaries_page(read(DICTIONARIES)), encoding="utf-8")


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
