"""The page about families, from what ``families_measure.py`` read off running models."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from docs_site.texts import table

from hookpoints.hooks.table import rows
from hookpoints.rules import REFUSED, REFUSED_LAYERS


@dataclass(frozen=True)
class Facts:
    """What the code says of one model type."""

    rule: str
    """Name of the update rule."""
    state: str
    """What its layers call K and V."""
    rank: int
    """Of a token's write, in the model that was run."""
    erase: str
    """a b^T in symbols."""
    decay: str
    read: str
    """Whether a token reads the state after or before its own write."""
    hooks: list[str]
    """Hooks on its factors; those of writes, states and reads are every rule's."""


@dataclass(frozen=True)
class Family:
    """One model type: what it is, and how far its recurrence here is from somebody else's."""

    model_type: str
    source: str
    """Who defines the model: transformers, fla or hookpoints."""
    facts: Facts
    sizes: str
    """H, K and V of the model that was run."""
    op_oracle: str
    """Who computed its op calls over again, in float64."""
    op_error: float
    """Largest difference of reads and last states, over their largest value."""
    logits_oracle: str
    """Who computed its logits, in float32."""
    logits_error: float
    """Largest difference of logits, absolute."""
    largest_logit: float
    kernels_error: float | None
    """Largest difference of logits from those of fla's own kernels in Triton's interpreter; None where not run."""

    def oracles(self) -> tuple[str, str]:
        """Who computed the op calls, and who the logits."""
        return self.op_oracle, self.logits_oracle


PAGE = """# Families

Made by `scripts/families_table.py`, not by hand: what is said of a family is read off a tiny random model of it while
it runs, and the errors are those of that run, on a CPU.

```math
S_t = (\\mathrm{{diag}}(\\alpha_t) + a_t b_t^\\top)\\, S_{{t-1}} + k_t u_t^\\top,
\\qquad o_t = S_t^\\top (\\mathrm{{scale}} \\cdot q_t)
```

## What each is

{rules}

A layer's state is a key-first matrix K × V for each head; the table names the two sizes as upstream's layers do.
{read} Hooks of every family: {common}. [What each carries](hooks/index.md).

## How far from the oracles

Two rows of 70 tokens. *Op*: every op call of the model, computed over again by the oracle from the same arguments, in
float64; the largest difference of reads and last states over their largest value. *Logits*: the model with
hookpoints' own recurrence in the place of every op (`backend="recurrence"`), against the same model by the oracle (the
second, where two are named), in float32; the largest difference, beside the largest logit. With the default backend
and nobody listening it is zero, bit for bit, wherever upstream has an op for the device. *Kernels*: logits by fla's
own kernels, which need a GPU, in Triton's interpreter, chunked and step by step, in stretches from a cache and padded
(of SimpleGLA, which fla has as a layer without a model, the outputs of one call). RWKV-7's chunked kernel is further
off than the rest because it solves its triangular systems in float16; it is as far from fla's own recurrent kernel.
Decoding, padding, other dtypes and edits are tested in `tests/hookpoints/model`, `tests/hookpoints/rules`,
`tests/hookpoints/rwkv7` and `tests/hookpoints/fla`.

{models}

## Refused

`UnsupportedModelError` names the reason; for a checkpoint, before its weights are read. The last rows are layers of
fla, by class, of which it has no models.

{refused}
"""

RULE_HEAD = (
    "family",
    "model types",
    "state K × V",
    "rank of a token's write",
    "erase a bᵀ",
    "decay α",
    "hooks on factors",
    "tested against",
    "largest error: op, logits",
)
MODEL_HEAD = ("model type", "from", "H, K, V", "oracle", "op", "logits", "largest logit", "kernels")


def markdown(families: Iterable[Family]) -> str:
    """The page."""
    families = list(families)
    by_rule = defaultdict(list)
    for family in families:
        by_rule[family.facts.rule].append(family)
    before = [rule for rule, members in by_rule.items() if "before" in members[0].facts.read]
    return PAGE.format(
        rules=table(RULE_HEAD, (_rule_row(rule, members) for rule, members in by_rule.items())).rstrip(),
        read=f"A token reads the state after its own write; in {' and '.join(before)} before it.",
        common=", ".join(f"`{name}`" for name in _common_hooks()),
        models=table(MODEL_HEAD, map(_model_row, families)).rstrip(),
        refused=table(("model types, layers", "reason"), _refused_rows()).rstrip(),
    )


def _common_hooks() -> Iterator[str]:
    yield from (row.name for row in rows("mixer") if row.factor is None)
    yield from (f"heads.{{h}}.{row.name}" for row in rows("head"))


def _rule_row(rule: str, families: list[Family]) -> list[str]:
    facts = [family.facts for family in families]
    rank = max(f.rank for f in facts)
    oracles = [name for family in families for name in family.oracles()]
    errors = f"{max(f.op_error for f in families):.0e}, {max(f.logits_error for f in families):.0e}"
    return [
        rule,
        ", ".join(f"`{f.model_type}`" + (" (fla)" if f.source == "fla" else "") for f in families),
        _distinct(f"`{f.state}`" for f in facts),
        "1" if rank == 1 else f"R, its steps ({rank} as run)",
        _distinct(f.erase for f in facts),
        _distinct(f.decay for f in facts),
        ", ".join(f"`{name}`" for name in facts[0].hooks),
        _distinct(oracles + ["fla's kernels" for f in families if f.kernels_error is not None]),
        errors,
    ]


def _model_row(f: Family) -> list[str]:
    kernels = "" if f.kernels_error is None else f"{f.kernels_error:.1e}"
    errors = [f"{f.op_error:.1e}", f"{f.logits_error:.1e}", f"{f.largest_logit:.1f}", kernels]
    return [f"`{f.model_type}`", f.source, f.sizes, _distinct(f.oracles()), *errors]


def _refused_rows() -> Iterator[list[str]]:
    by_reason = defaultdict(list)
    for name, reason in (*sorted(REFUSED.items()), *sorted(REFUSED_LAYERS.items())):
        by_reason[reason].append(f"`{name}`")
    yield from ([", ".join(names), reason] for reason, names in by_reason.items())


def _distinct(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(values))
