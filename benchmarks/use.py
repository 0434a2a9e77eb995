"""What dictionaries are good for, on equal terms: probes, detection and steering, on one page, docs/use.md.

    python benchmarks/use.py [probes detection steering]   minutes each; records go to docs/use/NAME.json
    python benchmarks/use.py --quick                       small sizes, to see that it runs; a folder that is printed
    python benchmarks/use.py --page                        the page alone, from the records that are there

`probes` needs sae-probes 0.4.2 (with xgboost and zstandard). Every code of a comparison is fitted to the same `Terms`:
the same rows of the same head in the same metric, with the same number of atoms.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "scripts")]

import frame  # noqa: E402
from tables import table  # noqa: E402

from hookpoints import HookedRecurrent, embedded  # noqa: E402
from hookpoints.files import atomic_text  # noqa: E402
from sae_lens_writesae import LowRank, train_many_on_writes, training_config  # noqa: E402
from writesae.codes.books import lloyd, residual_quantizer  # noqa: E402
from writesae.codes.components import fit_pca  # noqa: E402
from writesae.demo import START, Demo  # noqa: E402
from writesae.experiment import terms  # noqa: E402
from writesae.experiment.tokens import sample_sequences  # noqa: E402
from writesae.verdict.statistics import Estimate, estimate  # noqa: E402

NAMES = ("probes", "detection", "steering")
RIVALS = {
    "WriteSAE (1 active)": ("quantizer (1 active)", "random codes (1 active)"),
    "WriteSAE (4 active)": (
        "residual quantizer (4 stages)",
        "quantizer by pursuit (4 active)",
        "random codes (4 active)",
    ),
}
"""Each dictionary, and what has as many atoms, numbers and active atoms; the last one is the null."""
PAIRS = [(ours, theirs) for ours, rivals in RIVALS.items() for theirs in rivals]
SHOWN = dict(
    zip(map(frozenset, ([], [1], [-1], [1, -1])), ("not distinguishable from", "ahead of", "behind", "mixed with"))
)
"""What signs of intervals that exclude 0 say."""
CONTEXT = 128


class Code(NamedTuple):
    """A code of one head's writes."""

    encode: Callable[[Tensor, Tensor], Tensor]
    """Keys [N,K] and values [N,V] -> activations [N,F], 0 where an atom does not fire."""
    values: Tensor
    """[F,V] value sides of the atoms."""


class Terms(terms.Terms):
    """What every code of a comparison is fitted to: the head of a shipped model that `writesae demo` chooses, its
    writes on the training text, and its metric.

    Args:
        rows: rows that a dictionary is trained on, in epochs; quantizers and PCA are fitted to all writes.
    """

    def __init__(self, name: str, sequences: int, n_atoms: int, rows: int):
        model = HookedRecurrent.from_pretrained(name)
        super().__init__(model, sample_sequences(model, embedded.text("train"), CONTEXT, sequences))
        *self.place, _, self.nats = Demo().choose_head(model, self.tokens[:START])
        """Layer and head; KL per token of deleting all writes of the head."""
        self.n_atoms, self.rows = n_atoms, rows

    def describe(self) -> dict[str, Any]:
        """What the record says of them."""
        writes = self.writes(*self.place)
        numbers = self.n_atoms * sum(side.shape[2] for side in (writes.keys, writes.values))
        own = {"rows": len(writes), "atoms": self.n_atoms, "numbers": numbers, "nats": self.nats}
        return own | {"head": "L{}H{}".format(*self.place)}

    def codes(self) -> dict[str, Code]:
        """Dictionaries as the demo trains them, in the metric, with 1 and 4 active atoms; their rivals; and nulls."""
        moved, generator = self.metric(*self.place).move(self.writes(*self.place)), torch.Generator().manual_seed(0)
        moved = moved.rows(torch.nonzero(moved.norm()).flatten())
        order = torch.randperm(len(moved), generator=generator)
        drawn = moved.rows(order[: self.n_atoms])
        quantizer, random = lloyd(moved, drawn), drawn.random_like(generator)
        return {
            **dict(zip(RIVALS, self.trained((1, 4)))),
            "quantizer (1 active)": self.pursuit([quantizer]),
            "residual quantizer (4 stages)": self.pursuit(residual_quantizer(moved, self.n_atoms // 4, 4, seed=0)),
            "quantizer by pursuit (4 active)": self.pursuit([quantizer], 4),
            "native writes (1 active)": self.pursuit([drawn]),
            **{f"random codes ({k} active)": self.pursuit([random], k) for k in (1, 4)},
        }

    def trained(self, active: Sequence[int]) -> list[Code]:
        """Dictionaries with k active atoms each."""
        fields = {"d_sae": self.n_atoms, "context_size": CONTEXT, "training_tokens": self.rows, "verbose": False}
        fields |= {"metric": "gauss_newton"}
        configs = [training_config(self.model, *self.place, sae={"k": k}, **fields) for k in active]
        saes = train_many_on_writes(
            configs, [self.writes(*self.place)] * len(active), [self.metric(*self.place)] * len(active)
        )
        return list(map(of_sae, saes, active))

    def pursuit(self, stages: Sequence[LowRank], rounds: int = 1) -> Code:
        """The best code of each stage for what the codes before it leave, at its least-squares coefficient."""
        sides = (torch.cat([getattr(stage, side) for stage in stages]) for side in ("keys", "values"))
        codes, n = LowRank(*(normalize(side, dim=-1) for side in sides)), len(stages[0])
        gram, metric = codes.inners(codes), self.metric(*self.place)

        def encode(keys: Tensor, values: Tensor) -> Tensor:
            left = metric.move(LowRank.rank_one(keys, values)).inners(codes)
            acts = torch.zeros_like(left)
            for first in [*range(0, len(codes), n)] * rounds:
                best = first + left[:, first : first + n].abs().argmax(1, keepdim=True)
                gain = left.gather(1, best)
                acts.scatter_add_(1, best, gain)
                left = left - gain * gram[best[:, 0]]
            return acts

        return Code(encode, codes.values[:, 0] @ metric.value_inverse.to(codes.values))

    def pca(self, n: int) -> Code:
        """Scores of the first n components, in the metric; they have no sides."""
        metric = self.metric(*self.place)
        found = fit_pca(metric.move(self.writes(*self.place)), n)
        rows = lambda k, u: metric.move(LowRank.rank_one(k, u)).dense().flatten(1)  # noqa: E731
        return Code(lambda k, u: (rows(k, u) - found.mean) @ found.components.T, torch.empty(0, 0))


@torch.no_grad()
def of_sae(sae: Any, k: int) -> Code:
    """A TopK dictionary with a metric folded in, from the factors of a write: rows of K V numbers are never built."""
    encoder = LowRank(sae.v_enc.detach(), sae.w_enc.detach())
    bias = sae.b_enc.detach() - (sae.b_dec @ sae.W_enc if sae.cfg.apply_b_dec_to_input else 0)

    def encode(keys: Tensor, values: Tensor) -> Tensor:
        top = (LowRank.rank_one(keys, values).inners(encoder) + bias).topk(k)
        return torch.zeros(len(keys), len(bias)).scatter(1, top.indices, top.values.clamp_min(0))

    return Code(encode, sae.atoms().values[:, 0])


# ------------------------------------------------------------------------------------------------ records and the page

HEAD = """# What dictionaries are good for

Three measurements on equal terms, made by `python benchmarks/use.py`: probes on labeled data sets, automatic
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


def over(x: Sequence[float]) -> Estimate:
    """The mean over independent units."""
    return estimate(x, range(len(x)))


def told(x: Estimate, digits: int = 3) -> str:
    """A number with its interval."""
    return f"{x.mean:.{digits}f} [{x.low:.{digits}f}, {x.high:.{digits}f}]"


def differences(rows: dict[tuple[str, str], dict[str, Estimate]]) -> str:
    """A table of differences, and what their signs show."""
    shown: dict[str, list[str]] = {}
    for (ours, theirs), of in rows.items():
        signs = frozenset((x.low > 0) - (x.high < 0) for x in of.values()) - {0}
        shown.setdefault(f"{ours} is {SHOWN[signs]}", []).append(theirs)
    cells = ([f"{x} − {y}", *map(told, of.values())] for (x, y), of in rows.items())
    sentences = "".join(f"* {start} {', '.join(others)}.\n" for start, others in shown.items())
    return table(("difference", *next(iter(rows.values()))), cells) + "\n" + sentences


def page(docs: Path) -> str:
    """docs/use.md from the records in a folder."""
    parts = [HEAD]
    for file in (file for name in NAMES if (file := docs / "use" / f"{name}.json").exists()):
        own, record = importlib.import_module(f"use_{file.stem}"), json.loads(file.read_text("utf-8"))
        settings = ", ".join(f"{key} {value}" for key, value in record["settings"].items())
        parts += [f"## {file.stem.title()}", *["**Small sizes**, to see that it runs."] * record["quick"]]
        parts += [*own.text(record["found"]), FOOT.format(**record | {"settings": settings, "name": file.stem})]
    return "\n".join(f"{part.strip()}\n" for part in parts)


def run(name: str, docs: Path, quick: bool) -> None:
    """Measure, and leave a record in one line."""
    file = docs / "use" / f"{name}.json"
    frame.main(importlib.import_module(f"use_{name}"), ["--json", str(file), *["--quick"] * quick])
    atomic_text(file, json.dumps(json.loads(file.read_text("utf-8")), separators=(",", ":"), ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--quick", action="store_true", help="small sizes; leaves docs as it is")
    parser.add_argument("--page", action="store_true", help="run nothing")
    options = parser.parse_args()
    docs = Path(tempfile.mkdtemp(prefix="use-")) if options.quick else DOCS
    for name in () if options.page else options.names or NAMES:
        run(name, docs, options.quick)
    atomic_text(docs / "use.md", page(docs))
    print(docs / "use.md")


if __name__ == "__main__":
    main()
