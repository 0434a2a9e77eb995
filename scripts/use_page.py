"""What dictionaries and operations on memories are good for: docs/use.md and docs/memory_surgery.md.

    python scripts/use_page.py [probes detection steering memory]   minutes each; records go to docs/use/NAME.json
    python scripts/use_page.py --quick                       small sizes, to see that it runs; a folder that is printed
    python scripts/use_page.py --page                        the pages alone, from the records that are there

`writesae.use` measures, and `use_probes.py`, which needs sae-probes 0.4.2 (with xgboost and zstandard).
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import frame  # noqa: E402
import use_probes  # noqa: E402
from tables import table  # noqa: E402

from hookpoints.files import atomic_text  # noqa: E402
from writesae.use import detection, memory  # noqa: E402
from writesae.use.features import RIVALS  # noqa: E402
from writesae.verdict.finding import said  # noqa: E402
from writesae.verdict.statistics import Estimate, estimate, estimate_difference  # noqa: E402

NAMES = ("probes", "detection", "steering", "memory")
PAIRS = [(ours, theirs) for ours, rivals in RIVALS.items() for theirs in rivals]
SIGNS = {
    frozenset[int](): "not distinguishable from",
    frozenset({1}): "ahead of",
    frozenset({-1}): "behind",
    frozenset({1, -1}): "mixed with",
}
"""What signs of intervals that exclude 0 say."""
Differences = dict[tuple[str, str], dict[str, Estimate]]

HEAD = """# What dictionaries are good for

Three measurements on equal terms, made by `python scripts/use_page.py`: probes on labeled data sets, automatic
explanations of atoms, and steering. Each compares WriteSAE dictionaries of one head's writes with codes that need no
training by gradients, and with a null. Dictionaries are trained as `writesae demo` trains them, in the metric of the
model's KL divergence. The heads are those that `writesae demo` chooses in the models that ship with the package. These
models have 2.3 to 2.4 million parameters and a vocabulary of 2,048 tokens, so absolute scores are modest.

What the page can show is limited: one or two heads, one training of each dictionary, 19 data sets and 8 targets. A
difference of a few points would not be seen here. "Not distinguishable" is therefore no evidence that a dictionary has
no advantage.

* **WriteSAE**: a TopK dictionary with 1 or 4 active atoms.
* **quantizer**: codes of Lloyd's algorithm, with a gain; 1 active code, or 4 by matching pursuit on the same codes.
* **residual quantizer**: 4 quantizers with a quarter of the codes each, each of what the stages before it leave.
* **native writes**: as many writes, drawn at random, instead of learned codes.
* **random codes**: the null, Gaussian atoms that nothing was learned for.

"Ahead" and "behind" say that the interval of the difference excludes 0 in one column or more, always on the same side.
Intervals are not adjusted for the number of comparisons, and they do not include the variance over training seeds.
"""
HEADING = "### {name}, {head}: {rows:,} rows, {atoms} atoms of {numbers:,} numbers in all"
FOOT = """*{date}, {cpu}, threads: {threads}, {seconds:.0f} s under a load of {load:.0f}; torch {torch}, SAELens
{sae-lens}. Settings: {settings}. Record: `docs/use/{name}.json`.*"""
PROBES = """Of the {all} binary data sets of `sae-probes` {version}, one in {every} is used, in the order of their
names: {n} data sets, with {n_train} training and {n_test} test prompts each, both classes equally frequent. A prompt
keeps its last {longest} tokens. The features are those of its last token: codes of the head's write, {components}
principal components of the writes in the metric (more numbers than a code has), the residual stream at the layer's
output, and the numbers of the write's key and value. A probe selects the k features with the largest difference of
class means and fits a logistic regression; the last column uses all features. The score is the area under the ROC curve
(AUC) on test prompts; chance is 0.5. Values are means over data sets, with 95% intervals over data sets. Permuted
labels are those of the training prompts: a null."""
DETECTION = """The explanation of an atom is its firing rate after each token pair of the training text. Rates of
pairs shrink toward those of the second token, and these toward the mean rate, by the weight of one firing. The
explanation then predicts the firings on held-out text. Balanced accuracy is that of the rule "fires where its rate is
above its mean rate"; chance is 0.5. F1 is that of the rule "fires where its rate is above one half". Scores are means
over the atoms that fire {least} times or more in both texts, with 95% intervals over atoms. "Covered" is the share of
atoms that do so. "F1 of all atoms" is 0 for the others. The row "{null}" gives each atom of the first
dictionary the explanation of its neighbor: a null. A code of a quantizer fires with a gain of either sign, an atom of
WriteSAE with a positive one, so scores of several active atoms are not strictly on equal terms."""
STEERING = """`steer(model, layer, head, toward=...)` adds a value side to every write of one head. Its rivals add
a vector to the residual stream at the output of the same layer, at every token. Sizes are relative to the norms of the
write and of the residual stream. For each way and target, sign and strength are chosen on training text, such that the
side effect there is as large as that of deleting all writes of the head. Effects are then measured on held-out text.

* **effect**: mean change of log p(target), in nats.
* **side effect**: KL divergence of the distribution of the other tokens, in nats per token.
* **loss**: change of the loss at next tokens other than the target, in nats.
* **generated**: share of the target among sampled tokens.

Targets are words with a space before them that occur {often} times or more in the training text. Of these, sorted by
id, every n-th is used. "The token" is the value side that raises the target's logit along the direct path. "Nearest" is
the atom of WriteSAE (1 active), or the code of the quantizer (1 active), whose value side has the largest |cosine| with
it. Differences of means compare tokens before the target with all tokens of the training text, in the head's values or
in the residual stream: they use labels; the token and its unembedding use weights alone. "Random" is a Gaussian
direction: the null. Intervals are 95%, over targets."""


def mean(x: Sequence[float]) -> Estimate:
    """The mean over independent units."""
    return estimate(x, range(len(x)))


def told(x: Estimate) -> str:
    """A number with its interval."""
    return said(x, "{:.3f}".format)


def differences(rows: Differences) -> str:
    """A table of differences, and what their signs show."""
    sentences: dict[str, list[str]] = {}
    for (ours, theirs), columns in rows.items():
        signs = frozenset((x.low > 0) - (x.high < 0) for x in columns.values()) - {0}
        sentences.setdefault(f"{ours} is {SIGNS[signs]}", []).append(theirs)
    cells = ([f"{x} − {y}", *map(told, columns.values())] for (x, y), columns in rows.items())
    listed = "".join(f"* {start} {', '.join(others)}.\n" for start, others in sentences.items())
    return table(("difference", *next(iter(rows.values()))), cells) + "\n" + listed


def of_probes(found: dict[str, Any]) -> list[str]:
    """The section on probes."""
    heads = found["heads"]
    codes = {
        label: {k: np.mean([head["codes"][label][k] for head in heads.values()], 0) for k in rates}
        for label, rates in next(iter(heads.values()))["codes"].items()
    }
    *ks, everything = codes[use_probes.RESIDUAL]
    cells = (
        [label, *(told(mean(scores[k])) if k in scores else "" for k in (*ks, everything))]
        for label, scores in codes.items()
    )
    pairs = [*PAIRS, *((ours, theirs) for ours in RIVALS for theirs in ("PCA", use_probes.RESIDUAL))]
    gains = {(x, y): {f"k = {k}": mean(codes[x][k] - codes[y][k]) for k in ks} for x, y in pairs}
    headings = (HEADING.format(name=name, **head) for name, head in heads.items())
    columns = ("features", *(f"k = {k}" for k in ks), everything)
    introduction = PROBES.format(**found, n=len(found["data sets"]))
    return [introduction, *headings, table(columns, cells), differences(gains)]


def of_detection(found: dict[str, Any]) -> list[str]:
    """The section on detection."""
    parts = [DETECTION.format(least=found["least"], null=detection.NULL)]
    for name, head in found["heads"].items():
        codes, covered = {}, {}
        for label, scores in head["codes"].items():
            n = len(scores["F1"])
            codes[label] = scores | {"F1 of all atoms": scores["F1"] + [0.0] * (head["atoms"] - n)}
            covered[label] = f"{n / head['atoms']:.0%}"
        cells = ([label, *(told(mean(x)) for x in scores.values()), covered[label]] for label, scores in codes.items())
        gains: Differences = {}
        for ours, theirs in PAIRS:
            both = {kind: (x, codes[theirs][kind]) for kind, x in codes[ours].items()}
            gains[ours, theirs] = {
                kind: estimate_difference(x, y, range(len(x)), range(len(y))) for kind, (x, y) in both.items()
            }
        parts.append(HEADING.format(name=name, **head) + f", {head['held out']:,} held-out writes")
        parts += [table(("code", *codes[detection.NULL], "covered"), cells), differences(gains)]
    return parts


COLUMNS = ("effect", "side effect", "loss", "generated")
"""Of steering."""
BY_TOKEN, BY_ATOM, BY_CODE, BY_MEANS, BY_CHANCE = (
    f"steer: {way}" for way in ("the token", "nearest atom", "nearest code", "difference of means", "random")
)
RESIDUAL_MEANS = "residual stream: difference of means"
RESIDUAL_TOKEN = "residual stream: unembedding of the token"
STEERED = [
    *((BY_TOKEN, other) for other in (RESIDUAL_MEANS, RESIDUAL_TOKEN, BY_MEANS, BY_CHANCE)),
    *((BY_ATOM, other) for other in (BY_CODE, BY_MEANS, BY_CHANCE, RESIDUAL_MEANS)),
]
"""Ways to steer that are compared."""


def of_steering(found: dict[str, Any]) -> list[str]:
    """The section on steering."""
    parts = [STEERING.format(**found)]
    for name, head in found["heads"].items():
        ways = {}
        for way, of_targets in head["ways"].items():
            _, *columns = zip(*of_targets)  # the first one is the strength
            ways[way] = dict(zip(COLUMNS, columns))
        cells = ([way, *(told(mean(x)) for x in columns.values())] for way, columns in ways.items())
        gains = {
            (x, y): {kind: mean(np.subtract(ways[x][kind], ways[y][kind])) for kind in ("effect", "generated")}
            for x, y in STEERED
        }
        parts.append(HEADING.format(name=name, **head) + f", a side effect of {head['nats']:.4f} nats")
        parts += [f"Targets:{','.join(head['targets'])}.", table(("way", *COLUMNS), cells), differences(gains)]
    return parts


SECTIONS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "probes": of_probes,
    "detection": of_detection,
    "steering": of_steering,
}


def use_page(folder: Path) -> str:
    """docs/use.md from the records in a folder."""
    parts = [HEAD]
    for name, section in SECTIONS.items():
        file = folder / f"{name}.json"
        if file.exists():
            record = json.loads(file.read_text("utf-8"))
            settings = ", ".join(f"{key} {value}" for key, value in record["settings"].items())
            parts += [f"## {name.title()}", *["**Small sizes**, to see that it runs."] * record["quick"]]
            parts += [*section(record["found"]), FOOT.format(**record | {"settings": settings, "name": name})]
    return "\n".join(f"{part.strip()}\n" for part in parts)


# ----------------------------------------------------------------------------------------------- operations on memories

FAMILIES = {
    "embedded": "Gated DeltaNet hybrid",
    "embedded-mamba2": "Mamba-2, all recurrent",
    "embedded-rwkv7": "RWKV-7, all recurrent",
}
INTRODUCTION = f"""\
What does a memory forget when a span is cut out, and how near is it to one that never read the span? Each operation of
[Memory](memory.md) is compared with a run that really did, or did not, read the span, on held-out text. The span has
{memory.SPAN} tokens, and {memory.BEFORE} tokens come before it. `scripts/use_page.py` makes this page.

## Is the span still familiar?

The span is read again ({{familiar}} sequences). A memory that read it predicts its tokens better than one that never
did: by so many nats per token is it *familiar*. Of this a cut memory has lost the share below; 1 is a memory that never
read the span, 0 is one that did. *without* reads no token after the span again (`reread=0`). The control is a memory
from which another span was cut. Of Mamba-2, 8 tokens later, reading the span has made it no easier to predict."""
STAKE = """\
## What is at stake for the next tokens

The same cut, judged by the tokens that come next in the text ({sequences} sequences). The further away the span is,
the less they depend on it: the KL in nats per token of doing nothing, and the share of tokens whose most probable next
token differs. The tables below give shares of these nats."""
SHARES = """\
## Shares of the KL of doing nothing

Numbers are totals, 1 - sum KL(operation) / sum KL(nothing) over all tokens after the memory, with their
[95% intervals](verdicts.md#intervals). 1 is exact, 0 is the same as doing nothing, below 0 is worse. States of all
layers change together. *nothing* has the KL in nats per token. *States alone* replaces the matrix states and does not
change convolution, token-shift and attention caches; *writes alone* also does not change the decay and the erase of the
span."""
LATER_NOTE = (
    "*Tokens read* is a share of reading the {m} tokens again, which is exact. *without* reads none (`reread=0`)."
)
RECALL = {"recall": "Gated DeltaNet", "recall-mamba2": "Mamba-2", "recall-rwkv7": "RWKV-7"}
FACTS = f"""\
A model of the [zoo](zoo.md) reads {memory.PAIRS} pairs of a name and a city. One of the pairs 2 to \
{memory.PAIRS - 2} is cut from the
memory, and the model is asked for a name. Numbers are shares of right answers, with 95% intervals (Wilson); chance is
0.02. *The pair before* is the one before the cut pair.

With `reread=0` Gated DeltaNet and Mamba-2 forget the wrong pair: their convolution lets the token after a pair write
that pair, so that the span holds the pair before it. The default reads the tokens again that see the span."""
TIMES = "How long each takes: [Benchmarks](benchmarks.md#operations-on-memories)."


def facts_table(found: dict[str, dict[str, dict[str, list[int]]]]) -> str:
    """Recall of facts by family and way of cutting."""
    lines = []
    for name, ways in found.items():
        for label, row in ways.items():
            shares = []
            for right, asked in row.values():
                interval = binomtest(right, asked).proportion_ci(method="wilson")
                shares.append(f"{right / asked:.2f} [{interval.low:.2f}, {interval.high:.2f}]")
            lines.append([RECALL[name], label, *shares, str(next(iter(row.values()))[1])])
    return table(["family", "cut", "the cut pair", "the pair before", "another", "n"], lines)


def cell(share: memory.Share) -> str:
    """A share with its interval, or the KL that shares are of."""
    if "kl" in share:
        return f"KL {share['kl']:.4f}"
    largest = max(abs(share[name]) for name in ("share", "low", "high"))
    digits = 0 if largest >= 10 else 2
    return said(Estimate(share["share"], share["low"], share["high"], 0, 0), f"{{:.{digits}f}}".format)


def shares_table(shares: memory.Shares, read: dict[str, float] | None = None) -> str:
    """Shares by tokens after the memory; `read`: tokens that operations read again, as shares."""
    rows = {label: [cell(row[name]) for name in memory.BINS] for label, row in shares.items()}
    columns = ["", *memory.BINS]
    if read is not None:
        columns.append("tokens read")
        for label, row in rows.items():
            row.append(f"{read[label]:.2f}" if label in read else "")
    return table(columns, ([label, *row] for label, row in rows.items()))


def familiarity(models: dict[str, Any]) -> str:
    """By model and number of tokens after the span: nats, and the shares that are lost."""
    rows = [(FAMILIES[name], m, row) for name, result in models.items() for m, row in result["familiar"].items()]
    columns = [name for name in max((row for _, _, row in rows), key=len) if name != "familiar"]
    lines = [
        [model, m, f"{row['familiar']['nats']:.3f}", *(cell(row[name]) if name in row else "" for name in columns)]
        for model, m, row in rows
    ]
    return table(["model", "tokens after the span", "nats per token", *columns], lines)


def stakes(models: dict[str, Any]) -> str:
    """By model and number of tokens after the span: KL of doing nothing, and tokens whose first choice differs."""
    lines = []
    for name, result in models.items():
        tables = {"0": result["at once"], **{m: later["shares"] for m, later in result["later"].items()}}
        for m, shares in tables.items():
            row = shares["nothing"]["all"]
            lines.append([FAMILIES[name], m, f"{row['kl']:.4f}", f"{row['top']:.1%}"])
    return table(["model", "tokens after the span", "KL in nats per token", "other first choice"], lines)


def memory_page(found: dict[str, Any]) -> str:
    """The page of what operations recover."""
    parts = ["# What operations on a memory recover", INTRODUCTION.format(**found), familiarity(found["models"])]
    parts += [STAKE.format(**found), stakes(found["models"]), SHARES]
    for name, result in found["models"].items():
        parts += [f"### {name}: {FAMILIES[name]}", "#### Cut at once: the span was read last"]
        parts.append(shares_table(result["at once"]))
        for m, later in result["later"].items():
            parts += [f"#### Cut later: {m} tokens were read after the span", LATER_NOTE.format(m=m)]
            parts += [shares_table(later["shares"], later["read"])]
        parts += ["#### Paste: a span that another memory read after other tokens", shares_table(result["paste"])]
        mixed = (
            (label, f"{each['kl']:.4f}", f"{each['kl to the other']:.4f}" if "kl to the other" in each else "")
            for label, each in result["compressed"].items()
        )
        parts += ["#### Truncated and mixed states, 128 tokens"]
        parts += [table(("", "KL in nats per token", "KL to the other"), mixed)]
    parts += ["## A fact that is cut", FACTS, facts_table(found["facts"])]
    return "".join(f"{part.strip()}\n\n" for part in [*parts, TIMES])


def run(name: str, docs: Path, quick: bool) -> None:
    """Measure, and leave a record in one line."""
    file = docs / "use" / f"{name}.json"
    measurement = use_probes if name == "probes" else importlib.import_module(f"writesae.use.{name}")
    frame.main(measurement, ["--json", str(file), *["--quick"] * quick])
    atomic_text(file, json.dumps(json.loads(file.read_text("utf-8")), separators=(",", ":"), ensure_ascii=False) + "\n")


def write(docs: Path) -> list[Path]:
    """The pages, from the records in a folder."""
    pages = [atomic_text(docs / "use.md", use_page(docs / "use"))]
    record = docs / "use" / "memory.json"
    if record.exists():
        found = json.loads(record.read_text("utf-8"))["found"]
        pages.append(atomic_text(docs / "memory_surgery.md", memory_page(found)))
    return pages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--quick", action="store_true", help="small sizes; leaves docs as it is")
    parser.add_argument("--page", action="store_true", help="run nothing")
    options = parser.parse_args()
    docs = Path(tempfile.mkdtemp(prefix="use-")) if options.quick else DOCS
    for name in () if options.page else options.names or NAMES:
        run(name, docs, options.quick)
    print(*write(docs), sep="\n")


if __name__ == "__main__":
    main()
