"""Write docs/dictionaries.md from what scripts/dictionary_study.py measured.

python scripts/dictionary_page.py docs/dictionaries.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from dictionary_study import CONTEXT, FITTED, HORIZON, POSITIONS, RECIPE, SEQUENCES, TRAINED
from docs_site.texts import table

from writesae.experiment.head_baselines import BASELINES
from writesae.verdict.names import NAMES
from writesae.verdict.statistics import Estimate, recovered_difference, recovered_share

PAGE = Path(__file__).parents[1] / "docs" / "dictionaries.md"
Line = Mapping[str, object]
Cell = tuple[str, str]
"""Model and head."""


class Study:
    """The lines of a study, by head, recipe and seed."""

    def __init__(self, lines: Sequence[Line]):
        self.lines = {(str(x["model"]), str(x["cell"]), str(x["recipe"]), int(str(x["seed"]))): x for x in lines}
        self.cells: list[Cell] = list(dict.fromkeys((model, cell) for model, cell, _, _ in self.lines))

    def of(self, cell: Cell, recipe: str) -> list[Line]:
        """All seeds of a recipe on a head."""
        return [line for (*place, name, _), line in self.lines.items() if (*place, name) == (*cell, recipe)]

    def kl(self, cell: Cell, recipe: str, condition: str = "atom") -> np.ndarray:
        """Sums of KL by sequence, mean over seeds; of a baseline where `condition` names one."""
        lines = self.of(cell, "k 1" if condition in BASELINES else recipe)
        return np.mean([kl[condition] for line in lines if condition in (kl := line["kl"])], axis=0)  # type: ignore

    def share(self, cell: Cell, recipe: str, condition: str = "atom") -> Estimate | None:
        """Recovered share of a recipe, or of a baseline."""
        if not self.of(cell, recipe):
            return None
        deleted = self.kl(cell, recipe, "delete")
        return recovered_share(self.kl(cell, recipe, condition), deleted, np.arange(len(deleted)))

    def difference(self, cell: Cell, a: str, b: str, condition: str = "atom") -> Estimate | None:
        """Share of recipe `a` minus that of `b`, over the seeds that both have."""
        seeds = {seed for *place, recipe, seed in self.lines if (*place, recipe) == (*cell, a)}
        both = sorted(s for s in seeds if (*cell, b, s) in self.lines)
        if not both:
            return None
        kl = {
            name: np.mean([self.lines[(*cell, name, s)]["kl"][condition] for s in both], axis=0)  # type: ignore[index]
            for name in (a, b)
        }
        deleted = self.kl(cell, a, "delete")
        return recovered_difference(kl[a], kl[b], deleted, np.arange(len(deleted)))

    def mean(self, cell: Cell, recipe: str, field: str) -> float | None:
        """Mean over seeds of a number of the lines; of "stream", its point estimate."""
        values = [line[field][0] if field == "stream" else line[field] for line in self.of(cell, recipe)]  # type: ignore
        known = [float(v) for v in values if v is not None]
        return float(np.mean(known)) if known else None


def shown(value: Estimate | float | None) -> str:
    """A share in percent, with its interval where it has one."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{100 * value:.0f}"
    return f"{100 * value.mean:.0f} [{100 * value.low:.0f}, {100 * value.high:.0f}]"


def page(study: Study) -> str:
    """The page."""
    text = [HEAD.format(SEQUENCES=SEQUENCES, POSITIONS=POSITIONS, CONTEXT=CONTEXT, HORIZON=HORIZON, **RECIPE)]
    text += [summary(study), by_family(study), one_atom(study), metric(study)]
    recipes_there = {name for _, _, name, _ in study.lines}
    text += [sparsity(study)] if {"k 2", "k 4", "k 32"} & recipes_there else []
    text += [product(study)] if "product, metric" in recipes_there else []
    text += [recipes(study)] if {"k 1, random start", "k 1, 64 atoms"} & recipes_there else []
    text.append(FOOT)
    return "\n\n".join(text) + "\n"


def head_name(cell: Cell) -> str:
    """A head as the tables name it."""
    return f"{cell[0].removeprefix('embedded').removeprefix('-') or 'gdn'} {cell[1]}"


OPTIONS = (
    ("the metric", "k 1, metric", "k 1"),
    ("product codes", "product", "k 1"),
    ("product codes, both in the metric", "product, metric", "k 1, metric"),
)
"""What is compared with what, at equal parameters and one active atom."""
FAMILIES = {"embedded": "Gated DeltaNet", "embedded-mamba2": "Mamba-2", "embedded-rwkv7": "RWKV-7"}


def by_family(study: Study) -> str:
    """Where the metric and product codes pay: one row for each option and family."""
    rows, pays, harms = [], [], []
    for title, a, b in OPTIONS:
        for model in dict.fromkeys(model for model, _ in study.cells):
            cells = [cell for cell in study.cells if cell[0] == model]
            leads = [lead for cell in cells if (lead := study.difference(cell, a, b))]
            if not leads:
                continue
            above, below = sum(x.low > 0 for x in leads), sum(x.high < 0 for x in leads)
            streams = [stream(study, cell, a) - stream(study, cell, b) for cell in cells]
            name = FAMILIES.get(model, model)
            middle = f"{100 * np.median([x.mean for x in leads]):+.0f}"
            rows.append((title, name, len(leads), middle, above, below, f"{100 * np.median(streams):+.0f}"))
            pays += [f"{title} on {name}"] if above > below and np.median(streams) > 0 else []
            harms += [f"{title} on {name}"] if below > above and np.median(streams) < 0 else []
    head = (
        "option",
        "model",
        "heads",
        "one atom, median lead (points)",
        "interval above 0",
        "below 0",
        "whole stream, median lead",
    )
    return f"""## Which wins, and where not

Leads over `writesae_topk` with as many parameters and one active atom too: over squared errors, or where it says so
over the metric. It pays, which is to say that more intervals lie above 0 than below it and that the whole stream gains,
with **{"; ".join(pays) or "nothing"}**. It makes things worse with **{"; ".join(harms) or "nothing"}**. As no option
wins everywhere, try them on a head of your own: `dictionary_quality` tells.

{table(head, rows)}"""


def stream(study: Study, cell: Cell, recipe: str) -> float:
    """Recovered share of the whole stream; NaN where it was not measured."""
    value = study.mean(cell, recipe, "stream")
    return float("nan") if value is None else value


def one_atom(study: Study) -> str:
    """One atom against what needs no training."""
    rows = []
    for cell in study.cells:
        lines = study.of(cell, "k 1")
        seeds = [recovered_share(x["kl"]["atom"], x["kl"]["delete"], range(SEQUENCES)).mean for x in lines]  # type: ignore
        trained = f"{shown(study.share(cell, 'k 1'))} ({'/'.join(f'{100 * s:.0f}' for s in seeds)})"
        controls = [shown(study.share(cell, name)) for name in ("native writes", "untrained")]
        baselines = [shown(float(share.mean)) for n in BASELINES if (share := study.share(cell, "k 1", n))]
        rows.append((head_name(cell), f"{study.mean(cell, 'k 1', 'deleted'):.4f}", trained, *controls, *baselines))
    names = [NAMES[name] for name in BASELINES]
    head = ("head", "nats of deleting all", "atom, k 1 (by seed)", "drawn writes as a dictionary", "untrained", *names)
    beaten = [
        sum(ahead(study, cell, name) > 0 for cell in study.cells) for name in ("token_mean", "pair_mean", "quantised")
    ]
    n = len(study.cells)
    return f"""## What one atom is worth

Share of a deletion's effect that one atom recovers, in percent, with its interval over sequences. By point estimates,
the atom is ahead of the mean write of the token on {beaten[0]} of {n} heads, of the token pair on {beaten[1]}, and on
{beaten[2]} of the vector quantiser, which picks one of {RECIPE["d_sae"]} rank-1 directions and scales it to the write.
The terms are not equal: what needs no training is fitted by squared errors, on {FITTED * CONTEXT:,} of the
{TRAINED * CONTEXT:,} writes that a dictionary sees. On equal terms a vector quantiser does as well as an atom.

{table(head, rows)}"""


def ahead(study: Study, cell: Cell, name: str) -> float:
    """How far the atom of k 1 is ahead of a baseline."""
    atom, other = study.share(cell, "k 1"), study.share(cell, "k 1", name)
    return float("nan") if atom is None or other is None else atom.mean - other.mean


def metric(study: Study) -> str:
    """Squared errors against the Gauss-Newton metric."""
    rows, found, lower = [], [], []
    for cell in study.cells:
        gain = study.difference(cell, "k 1, metric", "k 1")
        found += [gain] if gain else []
        wide = [shown(study.mean(cell, name, "stream")) for name in ("k 1", "k 1, metric", "k 4", "k 4, metric")]
        known = [study.mean(cell, name, "explained") for name in ("k 1", "k 1, metric")]
        lower += [known[1] < known[0]] if known[0] is not None and known[1] is not None else []
        explained = ["" if value is None else f"{value:.2f}" for value in known]
        rows.append(
            (
                head_name(cell),
                shown(study.share(cell, "k 1")),
                shown(study.share(cell, "k 1, metric")),
                shown(gain),
                shown(study.difference(cell, "k 4, metric", "k 4")),
                *wide,
                *explained,
            )
        )
    head = (
        "head",
        "one atom, squares",
        "one atom, metric",
        "gain at k 1",
        "gain at k 4",
        *(f"whole stream, {name}" for name in ("k 1", "k 1 metric", "k 4", "k 4 metric")),
        "explained variance, squares",
        "metric",
    )
    better, worse = sum(g.low > 0 for g in found), sum(g.high < 0 for g in found)
    return f"""## The model's own metric

`metric="gauss_newton"` measures the error of a write by the KL divergence that it causes. At k 1 the interval of the
gain lies above 0 on {better} of {len(found)} heads, below 0 on {worse}, and reaches 0 on the others. Explained variance
is lower in the metric on {sum(lower)} of {len(lower)} heads, whether the effect grows there or not.

{table(head, rows)}"""


def sparsity(study: Study) -> str:
    """k 1, 2, 4, 32."""
    names = ("k 1", "k 2", "k 4", "k 32")
    rows = []
    for cell in study.cells:
        atoms = [shown(study.share(cell, name)) for name in names]
        codes = [shown(float(s.mean)) if (s := study.share(cell, name, "code")) else "" for name in names]
        rows.append((head_name(cell), *atoms, *codes, *(shown(study.mean(cell, name, "stream")) for name in names)))
    head = (
        "head",
        *(f"one atom, {n}" for n in names),
        *(f"code, {n}" for n in names),
        *(f"stream, {n}" for n in names),
    )
    return f"""## How many atoms

One atom of the code, the whole code at one position, and the whole stream (every write of the head replaced at once),
in percent of what deletion does.

{table(head, rows)}"""


def counts(study: Study, a: str, b: str) -> tuple[int, int, int]:
    """On how many heads the interval of a's lead over b lies above 0 and below 0, and how many heads have both."""
    leads = [lead for cell in study.cells if (lead := study.difference(cell, a, b))]
    return sum(x.low > 0 for x in leads), sum(x.high < 0 for x in leads), len(leads)


def product(study: Study) -> str:
    """Product codes against rank-1 atoms with as many parameters and one active latent."""
    pairs = (("product", "k 1"), ("product, metric", "k 1, metric"), ("product, metric", "k 1"))
    rows = []
    for cell in study.cells:
        shares = [shown(study.share(cell, name)) for name in ("k 1, metric", "product", "product, metric")]
        leads = [shown(study.difference(cell, *pair)) for pair in pairs]
        streams = [shown(study.mean(cell, name, "stream")) for name in ("k 1, metric", "product", "product, metric")]
        rows.append((head_name(cell), *shares, *leads, *streams))
    said = [
        f"{better} of {n} heads above 0 and on {worse} below" for better, worse, n in (counts(study, *p) for p in pairs)
    ]
    head = (
        "head",
        *("k 1, metric", "product, squares", "product, metric"),
        *("product - k 1, squares", "product - k 1, both in the metric", "product in the metric - k 1 in squares"),
        *("whole stream: k 1, metric", "product, squares", "product, metric"),
    )
    return f"""## Product codes

`writesae_product` has {RECIPE["d_sae"]} key atoms and {RECIPE["d_sae"]} value atoms, one of each active, and with them
the parameters of {RECIPE["d_sae"]} rank-1 atoms; its atoms are all pairs. The interval of its lead over k 1 lies, with
squared errors in both, on {said[0]}; with the metric in both, on {said[1]}; and in the metric against k 1 in squares,
on {said[2]}.

{table(head, rows)}"""


def recipes(study: Study) -> str:
    """Start, steps, centring and size, as differences from k 1."""
    names = (
        "k 1, random start",
        "k 1, 500 steps",
        "k 1, not centred",
        "k 1, lr 1e-3",
        "k 1, 64 atoms",
        "k 1, 1024 atoms",
    )
    names = tuple(name for name in names if counts(study, name, "k 1")[2])
    rows = [
        (
            head_name(cell),
            *(shown(study.difference(cell, name, "k 1")) for name in names),
            *(shown(study.mean(cell, name, "stream")) for name in ("k 1", *names)),
        )
        for cell in study.cells
    ]
    head = ("head", *(f"{n.removeprefix('k 1, ')}: one atom" for n in names), "stream, k 1")
    verdicts = [
        f"{name.removeprefix('k 1, ')}: better on {better}, worse on {worse} of {n} heads"
        for name in names
        for better, worse, n in [counts(study, name, "k 1")]
    ]
    return f"""## Other recipes

Percentage points of one atom's recovered share against k 1 (native start, {RECIPE["steps"]} steps at {RECIPE["lr"]},
centred, {RECIPE["d_sae"]} atoms), same seeds; then the whole stream. By intervals that do not reach 0:
{"; ".join(verdicts)}.

{table((*head, *(f"stream, {n.removeprefix('k 1, ')}" for n in names)), rows)}"""


def summary(study: Study) -> str:
    """The numbers over all heads."""
    rows = []
    for recipe in dict.fromkeys(name for _, _, name, _ in study.lines):
        shares = [s.mean for cell in study.cells if (s := study.share(cell, recipe))]
        streams = [s for cell in study.cells if (s := study.mean(cell, recipe, "stream")) is not None]
        n = sum(len(study.of(cell, recipe)) for cell in study.cells)
        middle = [f"{100 * np.median(x):.0f}" if x else "" for x in (shares, streams)]
        rows.append((recipe, n, len(shares), *middle))
    for name in BASELINES:
        shares = [s.mean for cell in study.cells if (s := study.share(cell, "k 1", name))]
        rows.append((NAMES[name], "", len(shares), f"{100 * np.median(shares):.0f}", ""))
    head = (
        "what is written",
        "dictionaries",
        "heads",
        "one atom, median over heads",
        "whole stream, median over heads",
    )
    return f"## Summary\n\n{table(head, rows).rstrip()}"


HEAD = """# What a dictionary of writes is worth

How far a trained atom exceeds what needs no training, and where the model's own metric pays. On each head, {SEQUENCES}
held-out sequences of {CONTEXT} tokens with {POSITIONS} positions each: the write is replaced, and the KL divergence
from the native next-token distributions is averaged over the {HORIZON} tokens after it. The *recovered share* is
1 - sum KL / sum KL(deletion). All dictionaries are `writesae_topk` with {d_sae} atoms, {steps} steps of 128 writes at a
learning rate of {lr}, and start from native writes, unless the name says otherwise. The heads are those whose writes do
most in each of the three models of the package, at most two of a layer. `scripts/dictionary_study.py` measured it, and
`scripts/dictionary_page.py` wrote this page from its numbers, `docs/dictionaries.jsonl`."""

FOOT = """A dash: not measured. Intervals are over sequences; of a head with several seeds, the mean over its seeds is
compared, and the seeds stand beside it. Defaults of `training_config` are those of k 1."""


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path)
    parser.add_argument("--out", type=Path, default=PAGE)
    options = parser.parse_args()
    lines = [json.loads(line) for line in options.lines.read_text(encoding="utf-8").splitlines()]
    options.out.write_text(page(Study(lines)), encoding="utf-8")


if __name__ == "__main__":
    main()
