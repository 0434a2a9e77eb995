"""Write docs/families.md: what each family's memory is, and how far hookpoints is from what computes it elsewhere.

    python tools/families.py             from the rules and the errors in docs/families.json
    python tools/families.py --measure   runs the families of transformers again before, in 10 s on a CPU

What a family is comes from its rule. Errors of flash-linear-attention's families and of RWKV-7 stay as they are in the
file (runs of 2026-11-25). `.ci/fla` compares every family with flash-linear-attention's kernels.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests")]

from tables import table  # noqa: E402

from hookpoints import HookedRecurrent  # noqa: E402
from hookpoints.hooks.table import rows  # noqa: E402
from hookpoints.rules import Rule  # noqa: E402
from hookpoints.rules.known import NOT_HOOKED, OWN_RULES  # noqa: E402
from hookpoints.rules.refused import REFUSED_LAYERS  # noqa: E402
from hookpoints.rules.tables import FLA_GLA  # noqa: E402

DATA, PAGE = ROOT / "docs" / "families.json", ROOT / "docs" / "families.md"
Family = dict[str, Any]
"""One model type: its rule, who defines it ("source"), sizes, decay, oracles and errors."""

TEXT = """# Families

Does my model load, and how exact are its hooks? The first table has every family of models. The last one has the models
that do not load, with the reason. A layer's state is a key-first matrix K × V for each head:

```math
S_t = (\\mathrm{{diag}}(\\alpha_t) + a_t b_t^\\top)\\, S_{{t-1}} + k_t u_t^\\top,
\\qquad o_t = S_t^\\top (\\mathrm{{scale}} \\cdot q_t)
```

## Supported models

{rules}
*State* has the names that upstream's layers give to the two sizes. A write has rank 1; in Gated DeltaProduct it has
rank R, the number of its steps. In Mamba-1 each entry of the state has its own decay, and each value channel its own
pattern.
A token reads the state after its own write; in {before} it reads the state before it.

Every family has {common}.
A rule has the [hooks](hooks.md#every-hook) of its factors.

## Errors

The table compares each family with an oracle, on tiny random models, a CPU and two rows of 70 tokens.

* *Op*: the oracle computes every op call of the model from the same arguments, in float64. The number is the largest
  difference of reads and last states, relative to their largest value.
* *Logits*: hookpoints' own recurrence replaces every op (`backend="recurrence"`), in float32, and so does the oracle
  (the second, where two are named). The number is the largest difference of logits. With the default backend and no
  hooks attached, it is zero.
* *Kernels*: logits by fla's own kernels in Triton's interpreter, chunked and step by step, from a cache and padded.
  RWKV-7's chunked kernel solves its triangular systems in float16, and differs as much from
  fla's recurrent kernel.

`tests/hookpoints` also tests decoding, padding, other dtypes and edits. `tools/families.py` makes this page from the
rules and from `families.json`, and `--measure` measures the families of transformers again. The other errors are from
2026-11-25. The plug-in in the folder `rare` has more rules, and shows how to add one.

{models}
## Models that do not load

They raise `UnsupportedModelError` with this reason; for a checkpoint, before its weights are read. The last rows are
layers of fla, by class, of which it has no models.

{refused}"""


def rule_of(family: Family) -> Rule:
    """The rule of a model type; fla has its own ops, of which GLA's serves HGRN2 too."""
    rules = (*OWN_RULES, replace(FLA_GLA, name="HGRN2", sizes=("head_f_dim", "head_i_dim")))
    return next(x for x in rules if x.name == family["rule"] and x.kernel_only == (family["source"] == "fla"))


def erase(rule: Rule) -> str:
    """a b^T in symbols."""
    if not rule.erases:
        return "none" if not rule.own_erase else "−k (b∘αk)ᵀ" if rule.names.back else "its own a, b"
    return "−β k pᵀ" if rule.names.back else "−β k (αk)ᵀ" if rule.names.log_decay else "−β k kᵀ"


def distinct(values: Iterable[str]) -> str:
    """Each value once, in order."""
    return "; ".join(dict.fromkeys(values))


def rule_row(name: str, families: list[Family]) -> list[object]:
    """What a rule's families have in common."""
    rules = [rule_of(family) for family in families]
    oracles = [family[part] for part in ("op_oracle", "logits_oracle") for family in families]
    return [
        name,
        ", ".join(f"`{f['model_type']}`" + " (fla)" * (f["source"] == "fla") for f in families),
        distinct(f"`{rule.sizes[0]} × {rule.sizes[1]}`" for rule in rules),
        distinct(map(erase, rules)),
        distinct(family["decay"] for family in families),
        distinct([*oracles, *["fla's kernels"] * any(family["kernels_error"] for family in families)]),
    ]


def model_row(f: Family) -> list[object]:
    """Errors of a model type."""
    return [
        f"`{f['model_type']}`",
        f["source"],
        f["sizes"],
        distinct((f["op_oracle"], f["logits_oracle"])),
        f"{f['op_error']:.1e}",
        f"{f['logits_error']:.1e}",
        f"{f['largest_logit']:.1f}",
        f"{f['kernels_error']:.1e}" if f["kernels_error"] else "",
    ]


def page(families: list[Family]) -> str:
    """The page."""
    by_rule, by_reason = defaultdict(list), defaultdict(list)
    for family in families:
        by_rule[family["rule"]].append(family)
    for name, reason in (*sorted(NOT_HOOKED.items()), *sorted(REFUSED_LAYERS.items())):
        by_reason[reason].append(f"`{name}`")
    common = [row.name for row in rows("mixer") if row.factor is None] + [f"heads.{{h}}.{x.name}" for x in rows("head")]
    return TEXT.format(
        rules=table(
            (
                "family",
                "model types",
                "state K × V",
                "erase a bᵀ",
                "decay α",
                "tested against",
            ),
            (rule_row(name, members) for name, members in by_rule.items()),
        ),
        before=" and ".join(dict.fromkeys(rule.name for rule in OWN_RULES if rule.read_before_write)),
        common=", ".join(f"`{name}`" for name in common),
        models=table(
            ("model type", "from", "H, K, V", "oracle", "op", "logits", "largest logit", "kernels"),
            map(model_row, families),
        ),
        refused=table(("model types, layers", "reason"), ((", ".join(n), reason) for reason, n in by_reason.items())),
    )


@torch.no_grad()
def measured(model_type: str) -> Family:
    """A family of transformers, run: each op call compared with its canonical form, and logits with the model's own."""
    from tiny_models import VOCAB, KeepFloat64, make_hf

    tokens = torch.randint(1, VOCAB, (2, 70), generator=torch.Generator().manual_seed(1))
    native, exact = make_hf(model_type), make_hf(model_type).double()
    native.set_experts_implementation("eager")  # torch's grouped product knows no float64
    exact.set_experts_implementation("eager")
    logits = native(tokens).logits
    with KeepFloat64():
        model = HookedRecurrent.from_hf(exact, self_check=False)
        with model.recording() as record:
            model(tokens)
        pairs = [(recorded.recurrence.scan().outputs, recorded.native.outputs) for recorded in record.values()]
    first = model.cfg.recurrent_layers[0]
    rule, r = model.attachment.mixers[first].rule, record[first].recurrence
    by_kernel = HookedRecurrent.from_hf(native, backend="recurrence")(tokens)
    return {
        "model_type": model_type,
        "source": "transformers",
        "rule": rule.name,
        "rank": rule.rank,
        "decay": f"one per {'entry' if r.rates is not None else 'key channel' if r.decays_per_channel else 'head'}",
        "sizes": f"{r.H}, {r.K}, {r.V}",
        "op_oracle": "transformers' torch op",
        "op_error": max(float((ours - op).abs().max() / op.abs().max()) for ours, op in pairs),
        "logits_oracle": "transformers' torch op",
        "logits_error": float((by_kernel - logits).abs().max()),
        "largest_logit": float(logits.abs().max()),
        "kernels_error": None,
    }


def main(arguments: list[str]) -> None:
    """Measure where that is asked for, and write the page."""
    families = json.loads(DATA.read_text(encoding="utf-8"))
    if "--measure" in arguments:
        from tiny_models import MAKERS

        found = [measured(name) for name in MAKERS if name != "rwkv7"]
        found += [family for family in families if family["source"] != "transformers"]
        families = sorted(found, key=lambda family: (family["source"] == "fla", family["model_type"]))
        DATA.write_text(json.dumps(families, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page(families), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
